"""Sequences that lose their place: aborts, results that come too late, preemption."""

from __future__ import annotations

from collections import Counter

import pytest

from batching.core.types import FinishReason
from tests.core.harness import Harness, expected, limits, request


def crowded(**changes: object) -> Harness:
    """A run that admits more than its blocks will hold, so that it must preempt."""
    run = Harness(limits(**changes))
    run.scheduler._residents.output_forecast.share = 0.01
    return run


def test_abort_is_idempotent_and_needs_no_known_id() -> None:
    run = Harness(limits())
    run.add(request("a", [1, 2]))
    assert run.abort("nobody") is None
    event = run.abort("a")
    assert event is not None
    assert event.finish is FinishReason.ABORT
    assert run.abort("a") is None
    assert not run.scheduler.has_work


def test_blocks_and_slots_in_use_by_a_plan_are_not_given_away() -> None:
    run = Harness(limits(num_blocks=4, max_sequences=1, overlap=1, prefix_caching=False))
    run.add(request("a", [1] * 12, 2))
    run.plan()
    run.abort("a")
    assert run.scheduler.stats().blocks_used == 3
    run.add(request("b", [2] * 12, 2))
    assert run.plan() is None
    assert run.commit() == []
    assert run.scheduler.stats().blocks_used == 0
    run.drain()


def test_overlap_plans_ahead_and_drops_what_came_too_late() -> None:
    tokens, _ = expected(request("x", [2, 1], 9), limits())
    stop = tokens[3]
    count = tokens.index(stop) + 1
    run = Harness(limits(overlap=1))
    run.add(request("a", [2, 1], 9, stop_token_ids=(stop,)))
    run.drain()
    assert run.tokens("a") == tokens[:count]
    assert len(run.plans) == count + 1, "one step was planned before the stop was known"


def test_overlap_never_plans_past_max_tokens() -> None:
    run = Harness(limits(overlap=1))
    run.add(request("a", [2, 1], 3))
    run.drain()
    assert len(run.plans) == 3


def test_both_overlaps_deliver_the_same() -> None:
    delivered = []
    for overlap in (0, 1):
        run = Harness(limits(num_blocks=12, overlap=overlap))
        for n in range(6):
            run.add(request(str(n), [n] * (n + 1), 20))
        run.drain()
        delivered.append([run.tokens(str(n)) for n in range(6)])
    assert delivered[0] == delivered[1]


@pytest.mark.parametrize("overlap", [0, 1])
def test_the_newest_of_the_lowest_class_is_preempted_and_loses_nothing(overlap: int) -> None:
    run = crowded(num_blocks=9, policy="priority", overlap=overlap, prefix_caching=False)
    # They need 15 blocks of 9 in the end.
    run.add(request("low", [1] * 4, 16, priority=1))
    run.add(request("old", [2] * 4, 16))
    run.add(request("new", [3] * 4, 16))
    run.drain()
    inits = Counter(init.id for plan in run.plans for init in plan.inits)
    assert inits["low"] > 1
    assert inits["old"] == 1
    assert run.scheduler.stats().preemptions == inits.total() - 3


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    run = crowded(num_blocks=8)
    run.add(request("a", [1] * 8, 20))
    run.add(request("b", [2] * 8, 20))
    run.drain()
    stats = run.scheduler.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    assert stats.prompt_tokens == 16, "recomputed prompt tokens are not counted twice"


def test_prompt_logprobs_are_delivered_once_across_preemptions() -> None:
    run = crowded(num_blocks=8, max_step_tokens=4, prefix_caching=False)
    run.add(request("a", [1] * 8, 20, prompt_logprobs=0))
    run.add(request("b", [2] * 8, 20, prompt_logprobs=0))
    run.drain()  # the harness compares the entries with the prompt
    assert run.scheduler.stats().preemptions > 0


@pytest.mark.parametrize(("share", "together"), [(1.0, False), (0.01, True)])
def test_admission_follows_the_forecast_peak(share: float, together: bool) -> None:
    run = Harness(limits(num_blocks=8, prefix_caching=False))
    run.scheduler._residents.output_forecast.share = share
    run.add(request("a", [1] * 8, 20))  # 7 blocks in the end
    run.add(request("b", [2] * 8, 20))
    run.drain()
    assert (len(run.plans[1].sequences) == 2) == together
    assert (run.scheduler.stats().preemptions > 0) == together


def test_tenants_share_tokens_fairly() -> None:
    run = Harness(limits(policy="fair", max_sequences=1, prefix_caching=False))
    for n in range(6):
        run.add(request(f"greedy{n}", [1, n], 4, tenant="greedy"))
    for n in range(3):
        run.add(request(f"modest{n}", [2, n], 4, tenant="modest"))
    run.drain()
    order = [init.id[:-1] for plan in run.plans for init in plan.inits]
    assert order == ["greedy", "modest"] * 3 + ["greedy"] * 3
