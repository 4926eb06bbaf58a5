"""Accuracy of a checkpoint by kind of held-out prompt, as a table.

    python -m batching.builtin.evaluate MODEL_DIR [--kinds addition capitals …] [--limit N]

Decoding is greedy, except that stories are sampled as the model's generation config says, with a
fixed seed.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

from .tasks import KINDS, Task, prompts

BATCH = 50


@dataclass(frozen=True)
class Score:
    """How many of `count` answers were right, and how many ended with an end token."""

    kind: str
    count: int
    right: int
    ended: int
    wrong: list[tuple[str, str]]


def prompt_ids(tokenizer: FastTokenizer, task: Task) -> list[int]:
    if task.prompt is not None:
        return list(tokenizer(task.prompt, add_special_tokens=False).input_ids)
    text = tokenizer.apply_chat_template(
        task.messages, tools=task.tools, add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _pad_left(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def answers(
    model: PreTrainedModel, tokenizer: FastTokenizer, tasks: list[Task]
) -> list[tuple[str, bool]]:
    """(generated text, whether it ended with an end token) of each task; tasks of one kind."""
    rows = [prompt_ids(tokenizer, task) for task in tasks]
    ids, mask = _pad_left(rows, tokenizer.pad_token_id)
    ends = set(model.generation_config.eos_token_id)
    sampled = "stor" in tasks[0].kind
    how = {} if sampled else {"do_sample": False, "temperature": None, "top_p": None}
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tasks[0].max_tokens, **how
        )
    found: list[tuple[str, bool]] = []
    for row in out[:, ids.shape[1] :].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), None)
        found.append((tokenizer.decode(row[:stop], skip_special_tokens=True), stop is not None))
    return found


def score(
    model: PreTrainedModel, tokenizer: FastTokenizer, kind: str, limit: int, seed: int = 0
) -> Score:
    """Generate and grade `limit` held-out prompts of `kind`."""
    torch.manual_seed(seed)
    tasks = prompts(kind, limit, seed)
    right = ended = 0
    wrong: list[tuple[str, str]] = []
    for start in range(0, limit, BATCH):
        part = tasks[start : start + BATCH]
        for task, (text, stopped) in zip(part, answers(model, tokenizer, part), strict=True):
            good = task.grade(text)
            right += good
            ended += stopped
            if not good:
                wrong.append((task.prompt or task.messages[0]["content"], text))
    return Score(kind, limit, right, ended, wrong)


def load(folder: Path) -> tuple[PreTrainedModel, FastTokenizer]:
    """The checkpoint in `folder` in float32, so that scores do not depend on the machine's bf16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy on held-out prompts, by kind.")
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--limit", type=int, default=200, help="prompts a kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wrong", type=int, default=0, help="show this many wrong answers a kind")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load(arguments.model)
    print("| kind | prompts | right % | ended % |\n|---|---:|---:|---:|", flush=True)
    for kind in arguments.kinds:
        s = score(model, tokenizer, kind, arguments.limit)
        print(f"| {kind} | {s.count} | {100 * s.right / s.count:.1f} "
              f"| {100 * s.ended / s.count:.1f} |", flush=True)  # fmt: skip
        for prompt, text in s.wrong[: arguments.wrong]:
            print(f"    {prompt!r} -> {text!r}")


if __name__ == "__main__":
    main()
