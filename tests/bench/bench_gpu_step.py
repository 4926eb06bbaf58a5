"""A decode step on one GPU, without HTTP: by layers and by formats; and sampling by itself.

    python -m tests.bench.bench_gpu_step MODEL [--sequences 1 16 128] [--rounds N] [--profile]

Steps are submitted as the engine's loop does with overlap 1: the next before the last is waited
for. Prints Markdown, with each step's time over that of reading the weights once (no KV cache).
`--profile` instead lists where the time of the last number of sequences goes, with fused layers.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig

from batching.core.types import SequencePlan, StepPlan
from batching.worker import load
from batching.worker.draw_kernel import draw_into
from batching.worker.protocol import WorkerConfig
from batching.worker.sampling import Draws, draw
from batching.worker.torch_worker import TorchWorker
from tests.bench.bench_step import CONTEXT, Steps
from tests.bench.gpu_machine import bandwidth, milliseconds, require_gpu

# Name: whether our layers are used, and settings.
VARIANTS: dict[str, tuple[bool, dict[str, str]]] = {
    "transformers' layers": (False, {}),
    "fused layers": (True, {}),
    "fused, fp8 weights": (True, {"quantization": "fp8"}),
    "fused, int8 weights": (True, {"quantization": "int8"}),
    "fused, int4 weights": (True, {"quantization": "int4"}),
    "fused, fp8 keys and values": (True, {"kv_cache_dtype": "fp8"}),
}
KV_CACHE_GIB = 8.0
ROWS = (1, 16, 128, 256)  # of logits over M's vocabulary
VOCABULARY = 151_936
DEVICE = "cuda"


def decode(steps: Steps, sequences: int, rounds: int) -> float:
    """Seconds of a step of `sequences` that each have `CONTEXT` tokens."""
    steps.decode(sequences, CONTEXT, 1)  # the prompts, and whatever is set up
    plans = tuple(SequencePlan(slot, CONTEXT, 1, True) for slot in range(sequences))
    running: deque[Any] = deque()
    begin = time.perf_counter()
    for step in range(rounds):
        running.append(steps.worker.submit(StepPlan(step, (), plans)))
        if len(running) > 1:
            steps.worker.wait(running.popleft())
    steps.worker.wait(running.popleft())
    return (time.perf_counter() - begin) / rounds


def worker_of(options: argparse.Namespace, *, is_fused: bool, **settings: Any) -> TorchWorker:
    usual = load.has_triton
    with patch.object(load, "has_triton", usual if is_fused else lambda device: False):
        return TorchWorker(
            WorkerConfig(
                str(options.model),
                dtype="bfloat16",
                max_model_len=4096,
                max_sequences=max(options.sequences),
                kv_cache_gib=KV_CACHE_GIB,
                **settings,
            )
        )


def profile(options: argparse.Namespace) -> None:
    """The kernels of some steps by their time."""
    worker = worker_of(options, is_fused=True)
    steps, count = Steps(worker), options.sequences[-1]
    decode(steps, count, options.rounds)
    with torch.profiler.profile() as found:
        took = decode(steps, count, 50)
    print(f"{took * 1e3:.3f} ms a step of {count} sequences (50 of them, and their prompts)")
    print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=30))


def measure(options: argparse.Namespace) -> None:
    """A row for each variant: milliseconds by number of sequences."""
    config = AutoConfig.from_pretrained(options.model)
    # Rows of a table of its own are looked up, not read through.
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * 2
    speed = bandwidth()
    heads = [f"{count} × {CONTEXT}: ms (÷ weights)" for count in options.sequences]
    print(f"| {speed / 1e12:.2f} TB/s | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for name, (is_fused, settings) in VARIANTS.items():
        try:
            worker = worker_of(options, is_fused=is_fused, **settings)
        except Exception as error:  # the other rows are worth having
            print(f"| {name} | {error!r} |", flush=True)
            continue
        read = (worker.capabilities().weight_bytes - table) / speed
        took = [decode(Steps(worker), count, options.rounds) for count in options.sequences]
        cells = [f"{seconds * 1e3:.3f} ({seconds / read:.2f})" for seconds in took]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        worker.close()


def draws(vocabulary: int = VOCABULARY) -> None:
    """A row for each number of draws: by the kernel, and by torch, which sorts for top-p."""
    kinds = {
        "free": (None, None), "top-k 20": (20, None), "top-p 0.9": (None, 0.9), "both": (20, 0.9)
    }  # fmt: skip
    print(f"\n| draws of {vocabulary:,}: ms (torch's) | {' | '.join(kinds)} |")
    print(f"|{'---|' * (len(kinds) + 1)}")
    for rows in ROWS:
        logits = torch.randn(rows, vocabulary, device=DEVICE) * 3
        tokens = torch.empty(rows, dtype=torch.int64, device=DEVICE)
        heat, every = torch.ones(rows, device=DEVICE), torch.arange(rows, device=DEVICE)
        keys = torch.zeros(rows, 2, dtype=torch.int32, device=DEVICE)
        cells = []
        for top_k, top_p in kinds.values():
            some = Draws(every, heat, keys, max_k=top_k or 0)
            some.top_k = None if top_k is None else torch.full_like(every, top_k)
            some.top_p = None if top_p is None else heat * top_p
            kernel, plain = (
                milliseconds(run)
                for run in (partial(draw_into, tokens, logits, some), partial(draw, logits, some))
            )
            cells.append(f"{kernel:.3f} ({plain:.3f})")
        print(f"| {rows} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bench_gpu_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    require_gpu()
    if options.profile:
        profile(options)
        return
    measure(options)
    draws()


if __name__ == "__main__":
    main()
