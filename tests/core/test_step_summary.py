"""What the scheduler says of a step: who caught up, who lost its place, what others waited for."""

from __future__ import annotations

from batching.core.types import Lack, StepSummary
from tests.core.harness import Harness, limits, request


def last(run: Harness) -> StepSummary:
    summary = run.scheduler.last_step
    assert summary is not None
    return summary


def test_chunks_and_decodes() -> None:
    run = Harness(limits(max_step_tokens=8, block_size=4))
    assert run.scheduler.last_step is None
    run.add(request("a", [1] * 10))
    run.now = 5.0
    run.step()
    assert last(run) == StepSummary(5.0, 5.01, 1, (("a", 0, 8),))
    run.add(request("b", [2] * 3))
    run.step()
    # The second finds its place beside the rest of the first.
    assert last(run).chunks == (("a", 8, 2), ("b", 0, 3))
    run.step()
    assert (last(run).sequences, last(run).chunks) == (2, ())
    run.drain()


def test_a_prompt_of_which_one_token_is_left_is_a_chunk_too() -> None:
    run = Harness(limits(block_size=4))
    run.add(request("a", [1] * 9, 1))
    run.drain()
    run.add(request("b", [1] * 9, 1))
    run.step()
    assert last(run).chunks == (("b", 8, 1),)


def test_what_the_head_of_the_queue_waits_for() -> None:
    run = Harness(limits(max_sequences=1, max_step_tokens=8))
    run.add(request("a", [1] * 4))
    run.step()
    assert last(run).lack is None
    run.add(request("b", [1] * 4))
    run.step()
    assert last(run).lack is Lack.SLOTS

    run = Harness(limits(num_blocks=4, block_size=4))
    for name in ("a", "b"):
        run.add(request(name, [ord(name)] * 10, 2))
    run.step()
    assert last(run).lack is Lack.BLOCKS

    run = Harness(limits(max_step_tokens=8))
    for name in ("a", "b"):
        run.add(request(name, [ord(name)] * 12, 2))
    run.step()
    assert last(run).lack is Lack.TOKENS
    run.drain()


def test_who_is_preempted_is_named_once_and_computed_again() -> None:
    run = Harness(limits(num_blocks=6, block_size=2, prefix_caching=False))
    run.scheduler._residents.output_forecast.share = 0.01
    run.add(request("a", [1] * 4, 8))
    run.add(request("b", [2] * 4, 8))
    preempted, chunks = [], []
    while run.scheduler.has_work:
        run.step()
        preempted += last(run).preempted
        chunks += [id for id, _, _ in last(run).chunks]
    assert len(preempted) == run.scheduler.stats().preemptions > 0
    assert len(chunks) == 2 + len(preempted)


def test_free_blocks_that_hold_content_are_counted() -> None:
    run = Harness(limits(num_blocks=8, block_size=4))
    run.add(request("a", [1] * 9, 1))
    run.drain()
    stats = run.scheduler.stats()
    assert (stats.blocks_used, stats.blocks_cached) == (0, 2)
    run.add(request("b", [1] * 9, 2))
    run.step()
    assert run.scheduler.stats().blocks_cached == 0  # a prompt hit them
    run.drain()
    assert run.scheduler.stats().blocks_cached == 2
