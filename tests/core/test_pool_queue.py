"""Batches of the pooling queue: complete, within their budget, fair between calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.core.pool_queue import BatchSize, PoolQueue
from batching.core.types import PoolRequest


def text(name: str, call: str, tokens: int = 1) -> PoolRequest:
    return PoolRequest(name, call, [7] * tokens, 0.0)


def fill(queue: PoolQueue, call: str, count: int, tokens: int = 1) -> None:
    for i in range(count):
        queue.add(text(f"{call}{i}", call, tokens))


def names(batch: list[PoolRequest]) -> list[str]:
    return [request.id for request in batch]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=60),
    st.integers(1, 64),
    st.integers(1, 9),
    st.sets(st.integers(0, 59)),
)
def test_every_text_is_taken_once_unless_it_was_aborted(
    texts: list[tuple[int, int]], budget: int, most: int, aborted: set[int]
) -> None:
    queue = PoolQueue()
    for i, (call, tokens) in enumerate(texts):
        queue.add(text(str(i), f"call{call}", tokens))
    gone = {i for i in aborted if queue.abort(str(i))}
    assert gone == {i for i in aborted if i < len(texts)}
    taken: list[str] = []
    while batch := queue.take(budget, most):
        assert len(batch) <= most
        assert len(batch) == 1 or sum(len(r.tokens) for r in batch) <= budget
        taken += names(batch)
    assert len(queue) == 0
    assert sorted(taken, key=int) == [str(i) for i in range(len(texts)) if i not in gone]
    for call in range(6):  # in order within a call
        ours = [name for name in taken if texts[int(name)][0] == call]
        assert ours == sorted(ours, key=int)


def test_a_late_single_text_does_not_wait_for_a_long_call() -> None:
    queue = PoolQueue()
    fill(queue, "long", 1000, tokens=10)
    queue.take(100, 64)
    queue.add(text("late", "single", 10))
    assert "late" in names(queue.take(100, 64))


def test_two_calls_share_by_tokens() -> None:
    queue = PoolQueue()
    fill(queue, "short", 400, tokens=5)
    fill(queue, "wide", 100, tokens=50)
    shares = {"short": 0, "wide": 0}
    for _ in range(10):
        for request in queue.take(200, 64):
            shares[request.call] += len(request.tokens)
    assert shares["wide"] == pytest.approx(shares["short"], abs=100)


def test_a_call_that_comes_back_has_no_credit() -> None:
    queue = PoolQueue()
    fill(queue, "steady", 300, tokens=10)
    for _ in range(10):
        queue.take(100, 64)
    fill(queue, "new", 100, tokens=10)
    batch = queue.take(100, 64)
    assert 4 <= sum(r.call == "new" for r in batch) <= 6


def test_a_text_longer_than_the_budget_goes_alone() -> None:
    queue = PoolQueue()
    queue.add(text("long", "a", 500))
    queue.add(text("short", "b", 1))
    assert [names(queue.take(100, 64)) for _ in range(3)] == [["long"], ["short"], []]


def test_an_id_waits_once() -> None:
    queue = PoolQueue()
    queue.add(text("x", "a"))
    with pytest.raises(ValueError, match="waits already"):
        queue.add(text("x", "b"))
    assert not queue.abort("unknown")


def test_batches_shrink_to_the_target_and_never_to_nothing() -> None:
    size = BatchSize(target=0.1, most=2048)
    assert (size.tokens, size.forecast(100)) == (2048, 0.0)
    for _ in range(60):
        size.ran(size.tokens, size.tokens / 5000)
    assert size.tokens == pytest.approx(500, abs=2)
    assert size.forecast(1000) == pytest.approx(0.2)
    size.ran(3, 0.1)  # a small batch is no measure
    assert size.tokens == pytest.approx(500, abs=2)
    for _ in range(60):
        size.ran(size.tokens, 10.0)
    assert size.tokens == 64
