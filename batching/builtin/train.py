"""Train the built-in model from nothing: tokenizer, corpus, weights.

    python -m batching.builtin.train --out DIR [--minutes N] [--threads 2] [--seed 0] [--resume]

Hidden matrices are updated by Muon (K. Jordan et al., "Muon: an optimizer for hidden layers in
neural networks", 2024), embeddings and norms by AdamW; the rate is constant after a short warmup
and falls linearly to zero over the last part (warmup-stable-decay). With `--minutes` the schedule
is stretched over whichever ends first, the step count or the time, so a slow machine still
finishes its decay.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from .corpus.chatml import END_OF_TEXT, IM_END
from .packing import Batch, batches
from .tokenizer import train_tokenizer

CONTEXT = 2048
SHORT, LONG = (6, 384), (1, CONTEXT)
"""(rows, tokens a row) of the two kinds of step."""
LONG_EVERY = 16
STEPS = 5000
WARMUP, DECAY = 60, 0.45
RATES = (0.01, 0.01, 2e-3)
STATE = "training_state.pt"


@dataclass
class Progress:
    """Where training stands: `step` of `STEPS`, and the seconds spent before this process."""

    step: int = 0
    seconds: float = 0.0

    def fraction(self, minutes: float, started: float) -> float:
        spent = self.seconds + time.monotonic() - started
        return min(1.0, max(self.step / STEPS, spent / (60 * minutes)))


def build(tokenizer: FastTokenizer) -> LlamaForCausalLM:
    """A float32 Llama-architecture model of 3.3 million parameters, freshly initialised."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(IM_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    # Which word a token is must not drown in what the layers add: embeddings start at unit
    # variance, layers at zero, and the last norm brings first logits back to unit variance.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    torch.nn.init.constant_(model.model.norm.weight, config.hidden_size**-0.5)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """For matrices, embedding and norms, in the order of `RATES`."""
    embedding = model.model.embed_tokens.weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(matrices, lr=RATES[0], weight_decay=0.3, momentum=0.95),
        # A tied embedding row gets a tiny "not this word" gradient at every position. Adam would
        # blow that up to full size and push all rare words the same way until they look alike,
        # and nothing could be copied; a large epsilon leaves it tiny.
        torch.optim.AdamW([embedding], lr=RATES[1], betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0),
        torch.optim.AdamW(norms, lr=RATES[2], betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, fraction: float) -> float:
    """The schedule's factor on the base rates, between 0 and 1."""
    return min(1.0, (step + 1) / WARMUP, max(0.0, 1.0 - fraction) / DECAY)


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross entropy (nats a token) over the learned tokens only."""
    # The first token of a document has nothing to be predicted from.
    wanted = batch.learned[:, 1:] & (batch.document[:, 1:] == batch.document[:, :-1])
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            input_ids=batch.ids, attention_mask=batch.visible(), use_cache=False
        ).last_hidden_state
        # Only learned positions reach the output layer: it is a fifth of the arithmetic.
        logits = model.lm_head(hidden[:, :-1][wanted])
    return torch.nn.functional.cross_entropy(logits.float(), batch.ids[:, 1:][wanted])


def stream(tokenizer: FastTokenizer, seed: int, first: int) -> Iterator[Batch]:
    """The batches from step `first` on: short rows, every sixteenth step long ones."""
    backend = tokenizer.backend_tokenizer
    # A resumed run starts a new stream rather than replaying the old one up to `first`.
    short = batches(backend, 2 * (seed + first), *SHORT)
    long = batches(backend, 2 * (seed + first) + 1, *LONG, long=True)
    for step in itertools.count(first):
        yield next(long) if step % LONG_EVERY == LONG_EVERY - 1 else next(short)


def save_model(model: LlamaForCausalLM, tokenizer: FastTokenizer, out: Path) -> None:
    """Write bfloat16 safetensors, configuration and generation defaults to `out`."""
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (IM_END, END_OF_TEXT)]
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[1], max_new_tokens=512
    )
    config = model.config
    half = LlamaForCausalLM(config)
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    half.generation_config = model.generation_config
    half.save_pretrained(out)


def train(out: Path, minutes: float, seed: int, *, resume: bool, compiled: bool) -> None:
    """Train until the steps or the minutes are used up; `out` holds a usable model throughout."""
    torch.manual_seed(seed)
    progress = Progress()
    if resume:
        tokenizer = AutoTokenizer.from_pretrained(out)
    else:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(out, seed)
    model = build(tokenizer).train()
    chosen = optimizers(model)
    if resume:
        state = torch.load(out / STATE, weights_only=True)
        progress = Progress(state["step"], state["seconds"])
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(chosen, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    if compiled:
        model.model.compile(dynamic=False)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)
    _steps(model, chosen, tokenizer, progress, out, minutes, seed)
    save_model(model, tokenizer, out)
    (out / STATE).unlink(missing_ok=True)
    print(f"wrote {out}", flush=True)


def _steps(
    model: LlamaForCausalLM,
    chosen: list[torch.optim.Optimizer],
    tokenizer: FastTokenizer,
    progress: Progress,
    out: Path,
    minutes: float,
    seed: int,
) -> None:
    started = saved = shown = time.monotonic()
    tokens, recent = 0, 0.0
    for batch in stream(tokenizer, seed, progress.step):
        fraction = progress.fraction(minutes, started)
        if fraction >= 1.0:
            return
        for optimizer, base in zip(chosen, RATES, strict=True):
            optimizer.param_groups[0]["lr"] = base * rate(progress.step, fraction)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        progress.step += 1
        tokens += batch.ids.numel()
        recent = loss.item() if recent == 0.0 else 0.95 * recent + 0.05 * loss.item()
        now = time.monotonic()
        if progress.step % 20 == 0:
            left = (now - started) / 60 * (1 - fraction) / max(fraction, 1e-6)
            print(f"step {progress.step}  loss {recent:.3f}  {tokens / (now - shown):.0f} tokens/s"
                  f"  {left:.0f} min left", flush=True)  # fmt: skip
            tokens, shown = 0, now
        if now - saved > 150:
            _checkpoint(model, chosen, tokenizer, progress, now - started, out)
            saved = now


def _checkpoint(
    model: LlamaForCausalLM,
    chosen: list[torch.optim.Optimizer],
    tokenizer: FastTokenizer,
    progress: Progress,
    seconds: float,
    out: Path,
) -> None:
    save_model(model, tokenizer, out)
    state = {
        "step": progress.step,
        "seconds": progress.seconds + seconds,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in chosen],
    }
    torch.save(state, out / STATE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the built-in model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=50.0, help="time limit (minutes)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from DIR's checkpoint")
    parser.add_argument("--eager", action="store_true", help="train without a C++ compiler, slower")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(
        arguments.out,
        arguments.minutes,
        arguments.seed,
        resume=arguments.resume,
        compiled=not arguments.eager,
    )


if __name__ == "__main__":
    main()
