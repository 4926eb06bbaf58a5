"""Requests whose time is over are dropped: never begun, or ended, and nothing of them stays."""

from __future__ import annotations

import pytest

from batching.core.event_log import RecordingScheduler, replay
from batching.core.types import FinishReason
from tests.core.harness import Harness, limits, request


def test_what_expired_while_waiting_is_never_computed() -> None:
    run = Harness(limits(max_sequences=1))
    run.add(request("first", [1, 2], 10))
    run.add(request("late", [3, 4], 4, deadline=0.05))
    run.add(request("patient", [5, 6], 4))
    run.drain()
    assert run.events["late"][-1].finish is FinishReason.EXPIRED
    assert run.tokens("late") == []
    planned = [init.id for plan in run.plans for init in plan.inits]
    assert planned == ["first", "patient"]


def test_a_prompt_that_is_not_through_by_its_deadline_frees_its_blocks() -> None:
    run = Harness(limits(max_step_tokens=4))
    run.add(request("a", [1] * 40, 4, deadline=0.045))
    for _ in range(4):
        run.step()
    assert run.scheduler.stats().blocks_used == 10
    run.step()
    assert [event.finish for event in run.expire()] == [FinishReason.EXPIRED]
    assert run.scheduler.stats().blocks_used == 0
    assert not run.scheduler.has_work


def test_the_deadline_of_the_first_token_ends_nothing_that_has_it() -> None:
    run = Harness(limits())
    run.add(request("a", [1, 2], 12, deadline=0.03))
    run.drain()
    assert run.events["a"][-1].finish is FinishReason.LENGTH


def test_a_resumed_request_has_had_its_first_token() -> None:
    run = Harness(limits())
    run.now = 1.0
    run.add(request("a", [1, 2], 12, deadline=0.5, generated=[0]))
    run.drain()
    assert run.events["a"][-1].finish is FinishReason.LENGTH


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_running_request_ends_when_its_time_is_over(overlap: int) -> None:
    run = Harness(limits(overlap=overlap))
    run.add(request("a", [1, 2], 40, end_by=0.095))
    run.add(request("b", [3], 20))
    run.drain()
    assert run.events["a"][-1].finish is FinishReason.EXPIRED
    assert 5 <= len(run.tokens("a")) <= 10
    assert run.events["b"][-1].finish is FinishReason.LENGTH


def test_an_expiry_is_replayed() -> None:
    lines: list[bytes] = []
    run = Harness(
        limits(max_sequences=1), make=lambda limits: RecordingScheduler(limits, write=lines.append)
    )
    run.add(request("first", [1, 2], 10))
    run.add(request("late", [3, 4], 4, deadline=0.05))
    run.drain()
    assert sum(line.startswith(b'["expire"') for line in lines) == 1
    assert list(replay(lines)) == run.plans


def test_nothing_is_looked_through_before_a_deadline_may_have_passed() -> None:
    run = Harness(limits())
    run.add(request("a", [1, 2], 40))
    run.add(request("b", [3], 4, end_by=9.0))
    assert run.scheduler._next_expiry == 9.0
    run.drain()
    run.now = 10.0
    assert run.expire() == []
    assert run.scheduler._next_expiry == float("inf")
