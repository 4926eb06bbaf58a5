"""Microseconds of `plan` + `commit` per step of decoding sequences, at several batch sizes.

    python -m tests.bench.bench_scheduler

Prints the median over steps, and the same at a context a hundred times longer: the two must agree,
because nothing in a step may grow with context length. Last, the prefix cache's cost per block.
"""

from __future__ import annotations

from statistics import median
from time import process_time

from batching.core.blocks import BlockPool
from batching.core.scheduler import Scheduler
from batching.core.types import Limits, Request, SamplingParams, StepPlan, StepResult

STEPS = 200


def decode_step_us(sequences: int, prompt_length: int, policy: str = "fcfs") -> float:
    """Median microseconds of a step in which all sequences decode."""
    blocks = sequences * ((prompt_length + 4 * STEPS) // 16 + 2)
    limits = Limits(
        num_blocks=blocks, block_size=16, max_sequences=sequences,
        max_model_len=prompt_length + 4 * STEPS, max_step_tokens=sequences * prompt_length,
        policy=policy,
    )  # fmt: skip
    scheduler = Scheduler(limits)
    for number in range(sequences):
        prompt = [number, *range(prompt_length - 1)]
        params = SamplingParams(max_tokens=2 * STEPS)
        scheduler.add(Request(str(number), prompt, params, 0.0, tenant=str(number % 8)), 0.0)
    while scheduler.stats().running < sequences:
        _step(scheduler)
    times = []
    for _ in range(STEPS):
        begin = process_time()
        plan = scheduler.plan(0.0)
        middle = process_time()
        assert plan is not None and len(plan.sequences) == sequences
        result = _result(plan)
        resume = process_time()
        scheduler.commit(result, 0.0)
        times.append(process_time() - resume + middle - begin)
    return median(times) * 1e6


def _result(plan: StepPlan) -> StepResult:
    # No machine is so even that the cost model has nothing to learn.
    seconds = 0.01 + 0.0003 * (plan.step % 7)
    return StepResult(plan.step, (1,) * sum(s.sample for s in plan.sequences), seconds)


def _step(scheduler: Scheduler) -> None:
    plan = scheduler.plan(0.0)
    assert plan is not None
    scheduler.commit(_result(plan), 0.0)


def cache_block_us(block_size: int) -> tuple[float, float]:
    """Microseconds to register and to look up one block."""
    count = 2000
    pool = BlockPool(count, block_size)
    tokens = [(n * 7919) % 50_000 for n in range(count * block_size)]
    blocks = pool.allocate(count)
    begin = process_time()
    parent: int | bytes = b""
    for index, block in enumerate(blocks):
        parent = pool.register(block, parent, tokens[index * block_size : (index + 1) * block_size])
    middle = process_time()
    found, _ = pool.lookup(tokens, b"", count)
    end = process_time()
    assert found == blocks
    return (middle - begin) / count * 1e6, (end - middle) / count * 1e6


def main() -> None:
    """Print the table."""
    print("sequences   context 64   context 6400   fair, 64    (µs of CPU time per step)")
    for sequences in (1, 64, 256, 1024):
        short = decode_step_us(sequences, 64)
        # The longest contexts would need gigabytes of token lists at large batches.
        long = decode_step_us(sequences, 6400) if sequences <= 64 else float("nan")
        fair = decode_step_us(sequences, 64, "fair")
        print(f"{sequences:9}   {short:10.1f}   {long:12.1f}   {fair:8.1f}")
    for size in (16, 64):
        register, lookup = cache_block_us(size)
        print(
            f"prefix cache, blocks of {size}: register {register:.2f} µs, look up {lookup:.2f} µs"
        )


if __name__ == "__main__":
    main()
