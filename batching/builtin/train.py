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
from collections import deque
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
REPORT_EVERY = 20
CHECKPOINT_SECONDS = 150.0
STATE = "training_state.pt"


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
        # Only learned positions reach the output layer: more than half need not.
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
        eos_token_id=ends,
        pad_token_id=ends[1],
        max_new_tokens=512,
        # What a server samples with unless asked otherwise: so small a model needs its tail cut.
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
    )
    config = model.config
    half = LlamaForCausalLM(config)
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    half.generation_config = model.generation_config
    half.save_pretrained(out)


@dataclass
class Training:
    """A run in progress: what a checkpoint saves and what a step changes."""

    model: LlamaForCausalLM
    tokenizer: FastTokenizer
    optimizers: list[torch.optim.Optimizer]
    out: Path
    step: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, out: Path, seed: int) -> "Training":
        """A new tokenizer and a fresh model."""
        out.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(out, seed)
        model = build(tokenizer)
        return cls(model, tokenizer, optimizers(model), out)

    @classmethod
    def resume(cls, out: Path) -> "Training":
        """The state of the last checkpoint in `out`; raises FileNotFoundError without one."""
        state = torch.load(out / STATE, weights_only=True)
        tokenizer = AutoTokenizer.from_pretrained(out)
        model = build(tokenizer)
        model.load_state_dict(state["model"])
        chosen = optimizers(model)
        for optimizer, saved in zip(chosen, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return cls(model, tokenizer, chosen, out, state["step"], state["seconds"])

    def checkpoint(self) -> None:
        """Save a usable model and, beside it, what `resume` needs."""
        save_model(self.model, self.tokenizer, self.out)
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, self.out / STATE)

    def update(self, batch: Batch, factor: float) -> float:
        """One step with the base rates times `factor`; returns the loss (nats a token)."""
        for optimizer, base in zip(self.optimizers, RATES, strict=True):
            optimizer.param_groups[0]["lr"] = base * factor
        loss = loss_of(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item()


def train(run: Training, minutes: float, seed: int) -> None:
    """Train until the steps or the minutes are used up; `out` holds a usable model throughout."""
    shown = saved = time.monotonic()
    tokens, losses = 0, deque[float](maxlen=REPORT_EVERY)
    for batch in stream(run.tokenizer, seed, run.step):
        fraction = max(run.step / STEPS, run.seconds / (60 * minutes))
        if fraction >= 1.0:
            break
        began = time.monotonic()
        losses.append(run.update(batch, rate(run.step, fraction)))
        now = time.monotonic()
        run.seconds += now - began
        tokens += batch.ids.numel()
        if run.step % REPORT_EVERY == 0:
            left = run.seconds / 60 * (1 / max(fraction, 1e-3) - 1)
            loss, speed = sum(losses) / len(losses), tokens / (now - shown)
            report = f"step {run.step}  loss {loss:.3f}  {speed:.0f} tokens/s  {left:.0f} min left"
            print(report, flush=True)
            tokens, shown = 0, now
        if now - saved > CHECKPOINT_SECONDS:
            run.checkpoint()
            saved = now
    save_model(run.model, run.tokenizer, run.out)
    (run.out / STATE).unlink(missing_ok=True)


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
    torch.manual_seed(arguments.seed)
    out = arguments.out
    run = Training.resume(out) if arguments.resume else Training.start(out, arguments.seed)
    parameters = sum(p.numel() for p in run.model.parameters())
    print(f"{parameters:,} parameters, {len(run.tokenizer)} tokens in the vocabulary", flush=True)
    if not arguments.eager:
        run.model.model.compile(dynamic=False)
    train(run, arguments.minutes, arguments.seed)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
