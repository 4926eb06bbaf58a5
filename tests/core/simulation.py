"""A scheduler under load on a virtual clock, and forecasts beside what came true."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator

from batching.core.cost_model import CostModel, StepFeatures
from batching.core.forecast import Room, ahead_of, first_token_seconds
from batching.core.scheduler import Scheduler
from batching.core.types import (
    Coefficients,
    EngineStats,
    Limits,
    Request,
    SamplingParams,
    StepResult,
)

TRUTH = Coefficients(4e-3, 1e-4, 2e-4, 1e-8, 1e-9)


class Simulation:
    """Requests on a machine whose steps cost `TRUTH`, give or take a tenth."""

    def __init__(self, limits: Limits, arrivals: list[Request]) -> None:
        self.rng = random.Random(3)
        self.limits = limits
        self.arrivals = deque(sorted(arrivals, key=lambda request: request.arrival))
        self.waiting: dict[str, Request] = {}
        self.forecasts: dict[str, float] = {}
        self.ratios: list[float] = []  # forecast by what came true
        self.waits: dict[str, float] = {}  # until the first token, by request
        self.now = 0.0

    def run(self, watched: str = "") -> None:
        """Until all is done that a tenant asked for, of all by default."""
        open_ids = {r.id for r in self.arrivals if watched in ("", r.tenant)}
        scheduler, stats = Scheduler(self.limits), EngineStats()
        truth = CostModel()
        truth.coefficients = TRUTH
        while open_ids:
            self._arrive(scheduler, stats, self.now)
            plan = scheduler.plan(self.now)
            if plan is None:
                self.now = self.arrivals[0].arrival
                continue
            seconds = truth.predict(StepFeatures.of(plan)) * self.rng.uniform(0.9, 1.1)
            self._arrive(scheduler, stats, self.now + seconds)
            self.now += seconds
            tokens = (1,) * sum(s.sample for s in plan.sequences)
            for event in scheduler.commit(StepResult(plan.step, tokens, seconds), self.now):
                if event.finish is not None:
                    open_ids.discard(event.id)
                begun = self.waiting.pop(event.id, None)
                if begun is not None:
                    self._note(begun)
            stats = scheduler.stats()
        self.preemptions = stats.preemptions

    def _note(self, request: Request) -> None:
        """It has its first token."""
        wait = self.waits[request.id] = self.now - request.arrival
        if request.id in self.forecasts:
            self.ratios.append(self.forecasts[request.id] / wait)

    def _arrive(self, scheduler: Scheduler, stats: EngineStats, until: float) -> None:
        """Requests come while a step runs, and see what was said after the one before."""
        room = Room(self.limits.max_sequences, self.limits.max_step_tokens)
        while self.arrivals and self.arrivals[0].arrival <= until:
            new = self.arrivals.popleft()
            ahead = ahead_of(new, self.waiting.values(), self.limits.policy)
            forecast = first_token_seconds(len(new.prompt), ahead, stats, room)
            if forecast is not None:
                self.forecasts[new.id] = forecast
            self.waiting[new.id] = new
            scheduler.add(new, until)


def poisson(
    rate: float, seconds: float, prompt: range, output: range, tenant: str = ""
) -> Iterator[Request]:
    """Requests of a tenant; none begins like another."""
    rng, now = random.Random(tenant), 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        params = SamplingParams(max_tokens=rng.choice(output))
        tokens = [rng.randrange(2**30), *[1] * rng.choice(prompt)]
        yield Request(f"{tenant}{now}", tokens, params, now, tenant=tenant, salt=tenant.encode())
