"""One step on the CPU worker, without HTTP or scheduler: milliseconds and share of the limit.

    python -m tests.bench.bench_step MODEL [--quantization int8] [--rounds N]

Decode steps of 1 to 64 sequences with a short context, one long context, and prefill chunks. The
limit is what memory and arithmetic allow (`machine.py`, measured in the same run).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path

from batching.core.types import SamplingParams, SequencePlan, SlotInit, StepPlan
from batching.worker.protocol import WorkerConfig
from batching.worker.torch_worker import TorchWorker
from tests.bench.machine import Machine, measure, model_size, token_seconds

CONTEXT = 160  # tokens before the measured decode steps
LONG = 4096
GREEDY = SamplingParams(max_tokens=1 << 20, temperature=0.0)


class Steps:
    """Plans for one worker; every slot owns a fixed run of blocks."""

    def __init__(self, worker: TorchWorker) -> None:
        self.worker, self.step = worker, 0
        limits = worker.capabilities()
        self.vocabulary, self._block_size = limits.vocab_size, limits.block_size

    def run(self, inits: tuple[SlotInit, ...], sequences: tuple[SequencePlan, ...]) -> float:
        """Seconds of one step."""
        self.step += 1
        plan = StepPlan(self.step, inits, sequences)
        return self.worker.wait(self.worker.submit(plan)).seconds

    def prefill(self, slots: Iterable[int], count: int, room: int = 0) -> float:
        """Seconds to compute fresh prompts of `count` tokens in one step; `room` for more."""
        blocks = -(-max(count, room) // self._block_size)
        inits, plans = [], []
        for slot in slots:
            tokens = [(7919 * (slot + 1) * (i + 3)) % self.vocabulary for i in range(count)]
            inits.append(SlotInit(slot, f"{slot}", tokens, count, GREEDY))
            table = tuple(range(slot * blocks, (slot + 1) * blocks))
            plans.append(SequencePlan(slot, 0, count, True, table))
        return self.run(tuple(inits), tuple(plans))

    def decode(self, sequences: int, context: int, rounds: int) -> float:
        """Median seconds of a step of `sequences` that each have `context` tokens."""
        for slot in range(sequences):
            for done in range(0, context, 1024):  # in chunks, as a server would
                count = min(1024, context - done)
                if done == 0:
                    self.prefill([slot], count, context + 1)
                else:
                    self.run((), (SequencePlan(slot, done, count, True),))
        plans = tuple(SequencePlan(slot, context, 1, True) for slot in range(sequences))
        return statistics.median(self.run((), plans) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantization", default="none", choices=("none", "int8"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 4, 16, 32, 64])
    parser.add_argument(
        "--prefill", nargs="*", default=["1x32", "1x128", "1x512", "1x2048", "16x128"],
        metavar="PROMPTSxTOKENS",
    )  # fmt: skip
    arguments = parser.parse_args()
    machine = measure()
    print(f"{machine.bandwidth / 1e9:.1f} GB/s, bf16 {machine.bf16 / 1e12:.2f} TFLOP/s, "
          f"{machine.idle:.0%} of the cores idle")  # fmt: skip
    config = WorkerConfig(
        str(arguments.model),
        quantization=arguments.quantization,
        max_model_len=LONG + 512,
        max_step_tokens=2048,
        kv_cache_gib=2,
    )
    report(Steps(TorchWorker(config)), arguments, machine)


def report(steps: Steps, arguments: argparse.Namespace, machine: Machine) -> None:
    size = model_size(arguments.model)
    if arguments.sequences:
        print("decode: sequences, context, ms, of the limit")
    cases = [(count, CONTEXT) for count in arguments.sequences]
    for sequences, context in [*cases, *([(1, LONG)] if len(cases) > 1 else [])]:
        seconds = steps.decode(sequences, context, arguments.rounds)
        best = token_seconds(size, machine, sequences)
        print(f"{sequences:6} {context:6} {seconds * 1e3:9.2f} {best / seconds:6.0%}", flush=True)
    if arguments.prefill:
        print("prefill: prompts x tokens, ms, of the limit")
    for shape in arguments.prefill:
        prompts, count = map(int, shape.split("x"))
        tries = [steps.prefill(range(prompts), count) for _ in range(5)]
        seconds = statistics.median(tries)
        head = size.parameters - size.layer_parameters  # for the last token only
        operations = 2 * prompts * (size.layer_parameters * count + head)
        best = max(operations / machine.bf16, size.weight_bytes / machine.bandwidth)
        print(f"{shape:>13} {seconds * 1e3:9.2f} {best / seconds:6.0%}", flush=True)


if __name__ == "__main__":
    main()
