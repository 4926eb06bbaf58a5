"""Ten thousand requests through the scheduler under a virtual clock."""

from __future__ import annotations

import random
from collections import deque

import pytest

from batching.core.scheduler import Scheduler
from batching.core.types import FinishReason, Limits, Request, SamplingParams, StepPlan, StepResult

REQUESTS = 10_000


def result(plan: StepPlan) -> StepResult:
    seconds = 4e-3 + 2e-5 * plan.token_count
    return StepResult(plan.step, (1,) * sum(s.sample for s in plan.sequences), seconds)


@pytest.mark.parametrize(("policy", "overlap"), [("fcfs", 0), ("fair", 1)])
def test_ten_thousand_requests(policy: str, overlap: int) -> None:
    rng = random.Random(7)
    limits = Limits(
        num_blocks=600, block_size=16, max_sequences=64, max_model_len=1024, max_step_tokens=1024,
        policy=policy, overlap=overlap,
    )  # fmt: skip
    scheduler = Scheduler(limits)
    system_prompts = [[n] * 64 for n in range(8)]
    wanted: dict[str, int] = {}
    arrivals: deque[Request] = deque()
    arrival = 0.0
    for n in range(REQUESTS):
        arrival += rng.expovariate(400.0)
        prompt = [*rng.choice(system_prompts), *range(rng.randrange(1, 100))]
        params = SamplingParams(max_tokens=rng.choice([1, 2, 8, 32]))
        arrivals.append(Request(str(n), prompt, params, arrival, tenant=str(n % 5)))
        wanted[str(n)] = params.max_tokens
    got = dict.fromkeys(wanted, 0)
    ended = 0
    now = 0.0
    flight: deque[StepPlan] = deque()
    while ended < REQUESTS:
        while arrivals and arrivals[0].arrival <= now:
            scheduler.add(arrivals.popleft(), now)
        plan = scheduler.plan(now) if len(flight) <= overlap else None
        if plan is not None:
            flight.append(plan)
        if flight and (plan is None or len(flight) > overlap):
            done = result(flight.popleft())
            now += done.seconds
            for event in scheduler.commit(done, now):
                got[event.id] += len(event.tokens)
                ended += event.finish is FinishReason.LENGTH
        elif not flight:
            now = max(now, arrivals[0].arrival)
    assert got == wanted
    scheduler.check_integrity()
    stats = scheduler.stats()
    assert stats.prefix_hits > 64 * REQUESTS // 2, "shared system prompts are mostly hits"
    assert stats.preemptions < REQUESTS // 20
