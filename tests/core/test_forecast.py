"""Forecasts of first tokens, beside what came true under a virtual clock."""

from __future__ import annotations

from statistics import median

import pytest

from batching.core.forecast import Ahead, Room, ahead_of, first_token_seconds
from batching.core.types import Coefficients, EngineStats, Limits, Outlook, Request
from tests.core.harness import request
from tests.core.simulation import Simulation, poisson


@pytest.mark.parametrize(
    ("rate", "slots", "policy", "prompt", "output"),
    [
        (2, 64, "fcfs", range(100, 1000), range(20, 200)),  # hardly any load
        (15, 64, "fcfs", range(100, 1000), range(20, 200)),  # more prompts than it can compute
        (4, 64, "fcfs", range(1000, 4000), range(20, 100)),  # long ones
        (20, 16, "fcfs", range(20, 200), range(100, 400)),  # too few slots
        (20, 16, "fair", range(100, 1000), range(20, 200)),
    ],
)
def test_forecasts_come_true(
    rate: float, slots: int, policy: str, prompt: range, output: range
) -> None:
    limits = Limits(
        num_blocks=4000, block_size=16, max_sequences=slots, max_model_len=8192,
        max_step_tokens=2048, policy=policy, prefix_caching=False,
    )  # fmt: skip
    streams = (poisson(rate / 4, 300 / rate, prompt, output, str(n)) for n in range(4))
    simulation = Simulation(limits, [request for stream in streams for request in stream])
    simulation.run()
    assert len(simulation.ratios) > 200
    assert 0.75 < median(simulation.ratios) < 1.25
    near = sum(0.5 < ratio < 2.0 for ratio in simulation.ratios)
    assert near > 0.75 * len(simulation.ratios)


# -- who is ahead --------------------------------------------------------------------------------


def waiting() -> list[Request]:
    return [
        request("a", [1] * 10, arrival=1.0, priority=1, tenant="x", deadline=9.0),
        request("b", [1] * 20, arrival=2.0, priority=0, tenant="x", deadline=4.0),
        request("c", [1] * 40, arrival=3.0, priority=2, tenant="y"),
    ]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("fcfs", Ahead(3, 70)),
        ("priority", Ahead(2, 30)),
        ("deadline", Ahead(1, 20)),
        # 5 own tokens and the 40 of its own tenant that wait are one share; x gets no more.
        ("fair", Ahead(3, 70)),
    ],
)
def test_who_is_ahead_depends_on_the_policy(policy: str, expected: Ahead) -> None:
    new = request("new", [1] * 5, arrival=4.0, priority=1, tenant="y", deadline=5.0)
    assert ahead_of(new, waiting(), policy) == expected


def test_of_a_greedy_tenant_no_more_than_ones_own_share_is_ahead() -> None:
    flood = [request(str(n), [1] * 100, tenant="greedy") for n in range(50)]
    new = request("new", [1] * 100, tenant="modest")
    assert ahead_of(new, flood, "fair") == Ahead(1, 100)
    assert ahead_of(new, flood, "fcfs") == Ahead(50, 5000)


# -- the formula ---------------------------------------------------------------------------------

ROOM = Room(max_sequences=4, max_step_tokens=100)


def outlook(**changes: object) -> Outlook:
    values: dict[str, object] = {
        "cost": Coefficients(0.01, 0.001, 0.0, 0.0, 0.0), "decode_seconds": 0.01,
        "prefill_seconds": 0.02, "prefilling": 0, "prefilled_tokens": 0, "output_tokens": 0.0,
        "blocked": False,
    }  # fmt: skip
    return Outlook(**(values | changes))  # type: ignore[arg-type]


def test_there_is_no_forecast_before_anything_was_measured() -> None:
    assert first_token_seconds(10, Ahead(), EngineStats(), ROOM) is None


def test_an_idle_engine_takes_its_prompt_in_whole_steps() -> None:
    stats = EngineStats(outlook=outlook())
    assert first_token_seconds(100, Ahead(), stats, ROOM) == pytest.approx(0.1 + 0.01)
    assert first_token_seconds(101, Ahead(), stats, ROOM) == pytest.approx(0.101 + 0.02)


def test_beside_decodes_prefill_is_spread_over_steps() -> None:
    stats = EngineStats(running=1, step_seconds=0.03, outlook=outlook())
    expected = 0.015 + 0.04 + 2 * 0.01  # half a step, 40 tokens in two steps
    assert first_token_seconds(40, Ahead(), stats, ROOM) == pytest.approx(expected)


def test_what_is_computed_or_probably_cached_is_no_work() -> None:
    stats = EngineStats(
        running=1, prefix_queries=100, prefix_hits=50,
        outlook=outlook(prefilling=1, prefilled_tokens=60),
    )  # fmt: skip
    # 40 of 100 tokens ahead remain, half of them and of its own are found.
    expected = 0.02 + 0.01 + 2 * 0.01
    assert first_token_seconds(20, Ahead(1, 100), stats, ROOM) == pytest.approx(expected)


def test_without_a_slot_it_waits_for_others_to_end() -> None:
    busy = EngineStats(running=4, outlook=outlook(output_tokens=80.0))
    # Each has 20 tokens to go, lasts 40 in all: one of four ends every 10 steps.
    assert first_token_seconds(1, Ahead(), busy, ROOM) == pytest.approx(0.001 + 10 * 0.01)
    assert first_token_seconds(1, Ahead(2, 0), busy, ROOM) == pytest.approx(0.001 + 30 * 0.01)
