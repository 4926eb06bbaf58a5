"""Leaping gives what stepping gives, to the last bit of the scheduler's state."""

from __future__ import annotations

import random
from collections import deque

import pytest

from batching.core.leap import LeapingScheduler
from batching.core.snapshot import freeze
from batching.core.types import Limits, Request, SamplingParams, StepPlan, StepResult

TOKEN = 1


def requests(seed: int) -> dict[int, list[Request]]:
    """By the step before which they come; several begin alike, and some answers repeat others."""
    rng = random.Random(seed)
    found: dict[int, list[Request]] = {}
    for number in range(40):
        prompt = [rng.randrange(3)] * rng.randrange(1, 40)
        params = SamplingParams(max_tokens=rng.choice([0, 1, 3, 60, 90]))
        request = Request(str(number), prompt, params, number, tenant="ab"[number % 2])
        found.setdefault(rng.randrange(600), []).append(request)
    return found


class Driver:
    """Keeps as many plans ahead as the engine would; step n takes a time of its own."""

    def __init__(self, limits: Limits) -> None:
        self.scheduler = LeapingScheduler(limits)
        self.limits = limits
        self.flight: deque[StepPlan] = deque()
        self.commits = 0
        self.leapt = 0

    def result(self, number: int) -> tuple[float, float]:
        """Seconds, and the time of the commit."""
        return 0.01 + 0.0001 * (number * 7 % 13), 0.01 * number

    def step(self) -> None:
        if self.flight:
            plan = self.flight.popleft()
            seconds, now = self.result(self.commits)
            tokens = (TOKEN,) * sum(s.sample for s in plan.sequences)
            self.scheduler.commit(StepResult(plan.step, tokens, seconds), now)
        while len(self.flight) <= self.limits.overlap:
            plan_made = self.scheduler.plan(0.01 * self.commits)
            if plan_made is None:
                break
            self.flight.append(plan_made)
        self.commits += 1

    def leap(self, most: int) -> None:
        count = min(most, self.scheduler.steady_steps())
        if count:
            steps = [self.result(self.commits + i) for i in range(count)]
            self.flight = deque(self.scheduler.leap(*zip(*steps, strict=True), TOKEN))
            self.commits += count
            self.leapt += count


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("how", [
    {}, {"num_blocks": 24}, {"max_sequences": 2}, {"policy": "fair", "max_sequences": 3},
    {"prefix_caching": False},
])  # fmt: skip
def test_a_leap_is_as_many_steps(seed: int, overlap: int, how: dict[str, object]) -> None:
    limits = Limits(**({
        "num_blocks": 200, "block_size": 8, "max_sequences": 8, "max_model_len": 160,
        "max_step_tokens": 32, "overlap": overlap,
    } | how))  # type: ignore[arg-type]  # fmt: skip
    rng = random.Random(seed)
    leaping, stepping = Driver(limits), Driver(limits)
    arrivals = requests(seed)
    while arrivals or leaping.scheduler.has_work:
        due = min(arrivals, default=10**9)
        leaping.leap(min(rng.randrange(1, 12), due - leaping.commits))
        while stepping.commits < leaping.commits:
            stepping.step()
        if rng.random() < 0.2:
            assert freeze(leaping.scheduler) == freeze(stepping.scheduler)
        assert leaping.flight == stepping.flight
        assert leaping.scheduler.last_step == stepping.scheduler.last_step
        for request in arrivals.pop(leaping.commits, ()):
            for driver in (leaping, stepping):
                driver.scheduler.add(request, 0.0)
        leaping.step()
        stepping.step()
        leaping.scheduler.check_integrity()
    assert freeze(leaping.scheduler) == freeze(stepping.scheduler)
    assert leaping.leapt > 50


def test_nobody_is_leapt_over_who_could_enter() -> None:
    driver = Driver(
        Limits(num_blocks=6, block_size=4, max_sequences=4, max_model_len=24, max_step_tokens=64)
    )
    for name in "ab":
        params = SamplingParams(max_tokens=12)
        driver.scheduler.add(Request(name, [1] * 11, params, 0.0, salt=name.encode()), 0.0)
    for _ in range(3):
        driver.step()
    stats = driver.scheduler.stats()
    assert (stats.running, stats.waiting) == (1, 1)
    assert driver.scheduler.steady_steps() == 0
    driver.scheduler.abort("b", 0.0)
    assert driver.scheduler.steady_steps() > 0
