"""Drives a scheduler against the distrustful fake worker and a model of what must come out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from batching.core.scheduler import Scheduler
from batching.core.types import (
    FinishReason,
    Limits,
    Request,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenEvent,
)
from tests.core.fake_worker import FakeWorker, next_token

ENDED_EARLY = (FinishReason.ABORT, FinishReason.EXPIRED)


def limits(**changes: object) -> Limits:
    """Small limits that nothing but the test's own changes presses on."""
    defaults: dict[str, object] = {
        "num_blocks": 64, "block_size": 4, "max_sequences": 8, "max_model_len": 64,
        "max_step_tokens": 64,
    }  # fmt: skip
    return Limits(**(defaults | changes))  # type: ignore[arg-type]


def request(id: str, prompt: list[int], max_tokens: int = 4, **changes: object) -> Request:
    """A greedy request; keywords of SamplingParams and of Request may be mixed."""
    params = {k: v for k, v in changes.items() if k in SamplingParams.__struct_fields__}
    others = {k: v for k, v in changes.items() if k not in params}
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    return Request(id, prompt, sampling, **({"arrival": 0.0} | others))  # type: ignore[arg-type]


def expected(request: Request, limits: Limits) -> tuple[list[int], FinishReason]:
    """What the fake model generates for a request (after `generated`), and how it ends."""
    params = request.params
    tokens = [*request.prompt, *request.generated]
    first = len(tokens)
    while True:
        generated = len(tokens) - len(request.prompt)
        if generated >= params.max_tokens or len(tokens) >= limits.max_model_len:
            return tokens[first:], FinishReason.LENGTH
        tokens.append(next_token(tokens))
        if tokens[-1] in params.stop_token_ids and generated >= params.min_tokens:
            return tokens[first:], FinishReason.STOP


class Harness:
    """A scheduler and a worker; every call is followed by an integrity check."""

    def __init__(
        self,
        limits: Limits,
        make: Callable[[Limits], Scheduler] = Scheduler,
        seconds: Callable[[StepPlan], float] = lambda plan: 0.01,
    ) -> None:
        self.limits = limits
        self.scheduler = make(limits)
        self.salts: dict[str, bytes] = {}
        self.worker = FakeWorker(limits, self.salts)
        self.requests: dict[str, Request] = {}
        self.events: dict[str, list[TokenEvent]] = {}
        self.results: deque[StepResult] = deque()
        self.plans: list[StepPlan] = []
        self.now = 0.0
        self._seconds = seconds

    def add(self, request: Request) -> None:
        self.scheduler.add(request, self.now)
        self.requests[request.id] = request
        self.salts[request.id] = request.salt
        self.events[request.id] = []
        self.scheduler.check_integrity()

    def abort(self, id: str) -> TokenEvent | None:
        event = self.scheduler.abort(id, self.now)
        if event is not None:
            assert event.finish is FinishReason.ABORT
            self._receive(event)
        self.scheduler.check_integrity()
        return event

    def expire(self) -> list[TokenEvent]:
        """As the engine's loop does before each plan."""
        events = self.scheduler.expire(self.now)
        for event in events:
            assert event.finish is FinishReason.EXPIRED
            self._receive(event)
        self.scheduler.check_integrity()
        return events

    def plan(self) -> StepPlan | None:
        """Plan a step and execute it; its result waits for `commit`."""
        plan = self.scheduler.plan(self.now)
        if plan is not None:
            self.plans.append(plan)
            self.results.append(self.worker.execute(plan, self._seconds(plan)))
        elif not self.results:
            assert not self.scheduler.has_work, "work, but no plan"
        self.scheduler.check_integrity()
        return plan

    def commit(self) -> list[TokenEvent]:
        result = self.results.popleft()
        self.now += result.seconds
        self.worker.in_flight.popleft()
        events = self.scheduler.commit(result, self.now)
        for event in events:
            self._receive(event)
        self.scheduler.check_integrity()
        return events

    def step(self) -> list[TokenEvent]:
        """Plan as far ahead as allowed, then commit one step."""
        while len(self.results) <= self.limits.overlap:
            self.expire()
            if self.plan() is None:
                break
        return self.commit() if self.results else []

    def drain(self) -> None:
        """Run everything to its end, which must come in bounded time, and check the outcome."""
        # The first of the order advances whenever results are in, so this is nobody's starvation.
        bound = sum(
            min(len(r.prompt) + r.params.max_tokens, self.limits.max_model_len)
            for r in self.requests.values()
        )
        for _ in range(3 * bound + 10):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "requests starve"
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
        for id in self.requests:
            self.check_outcome(id)

    def tokens(self, id: str) -> list[int]:
        return [token for event in self.events[id] for token in event.tokens]

    def check_outcome(self, id: str) -> None:
        """The ended request got exactly what the model says, once, in order."""
        request, events = self.requests[id], self.events[id]
        tokens, finish = expected(request, self.limits)
        if events[-1].finish in ENDED_EARLY:
            assert self.tokens(id) == tokens[: len(self.tokens(id))]
            return
        assert self.tokens(id) == tokens
        assert events[-1].finish is finish
        scored = [entry.token for event in events for entry in event.prompt_logprobs]
        assert scored == (request.prompt[1:] if request.params.prompt_logprobs is not None else [])

    def _receive(self, event: TokenEvent) -> None:
        events = self.events[event.id]
        assert not events or events[-1].finish is None, "an event after the last"
        assert event.tokens or event.prompt_logprobs or event.finish is not None, "no news"
        ended_unscheduled = event.finish in ENDED_EARLY and not events
        if not ended_unscheduled:
            assert (event.cached_tokens is None) == bool(events)
        events.append(event)
