"""Runs requests through the real scheduler and a worker, step by step, on a counted clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from batching.core.scheduler import Scheduler
from batching.core.types import (
    FinishReason,
    Limits,
    Request,
    SamplingParams,
    StepPlan,
    TokenEvent,
    TokenLogprobs,
)
from batching.worker.protocol import Worker

MAX_STEPS = 10_000


@dataclass
class Outcome:
    """What became of one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_tokens: int = 0
    finish: FinishReason | None = None


class Harness:
    """One scheduler over one worker; limits default to the worker's capabilities."""

    def __init__(self, worker: Worker, **limits: Any) -> None:
        capabilities = worker.capabilities()
        names = ("num_blocks", "block_size", "max_sequences", "max_model_len", "max_step_tokens")
        known = {name: getattr(capabilities, name) for name in names}
        self.worker = worker
        self.scheduler = Scheduler(Limits(**{**known, **limits}))
        self.plans: list[StepPlan] = []
        self._now = 0.0
        self._in_flight: deque[Any] = deque()

    @property
    def preemptions(self) -> int:
        return self.scheduler.stats().preemptions

    def run(self, requests: list[Request]) -> dict[str, Outcome]:
        """Serve the requests together until all have ended; outcomes by request id."""
        outcomes = {request.id: Outcome() for request in requests}
        for request in requests:
            self.scheduler.add(request, self._now)
        for _ in range(MAX_STEPS):
            if not self.scheduler.has_work:
                return outcomes
            self._now += 1.0
            for event in self._step():
                outcome = outcomes[event.id]
                outcome.tokens += event.tokens
                outcome.logprobs += event.logprobs
                outcome.prompt_logprobs += event.prompt_logprobs
                outcome.cached_tokens += event.cached_tokens or 0
                outcome.finish = event.finish or outcome.finish
            self.scheduler.check_integrity()
        raise AssertionError(f"requests did not end within {MAX_STEPS} steps")

    def _step(self) -> list[TokenEvent]:
        """Plan and commit as the engine's loop does."""
        plan = self.scheduler.plan(self._now)
        if plan is not None:
            self.plans.append(plan)
            self._in_flight.append(self.worker.submit(plan))
        assert self._in_flight, "there is work, and nothing is planned"
        if plan is not None and len(self._in_flight) <= self.scheduler.limits.overlap:
            return []
        return self.scheduler.commit(self.worker.wait(self._in_flight.popleft()), self._now)


def request(name: str, prompt: list[int], **params: Any) -> Request:
    """A request; greedy and without stop tokens unless `params` say otherwise."""
    return Request(name, prompt, SamplingParams(**{"temperature": 0.0, **params}), arrival=0.0)
