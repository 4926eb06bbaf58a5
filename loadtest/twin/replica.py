"""One simulated server: the production scheduler and block pool, and a step time for a worker.

It mirrors the engine's loop (`batching/engine/loop.py`): take in what arrived, plan, run, commit;
with overlap one more step is planned while one runs. Nothing here decides anything.
"""

from __future__ import annotations

from collections import deque

import msgspec

from batching.core.scheduler import Scheduler
from batching.core.step_time import StepLoad, StepTime
from batching.core.types import Limits, Request, StepPlan, StepResult, TokenEvent

GENERATED = 1  # every token that is made


class FrontEnd(msgspec.Struct, frozen=True):
    """Seconds outside the engine. One process takes all requests that are there in one turn of its
    loop, and hands them over together."""

    request: float = 0.001  # of a turn, each: HTTP, template, tokens, message to the engine
    gather: float = 0.0005  # before a turn: the network, waking up
    reply: float = 0.0005  # from a step's end to the client


class _Turn:
    """Requests that the front end takes together. Those that come before `begin` join."""

    __slots__ = ("begin", "requests", "seconds")

    def __init__(self, begin: float, seconds: float) -> None:
        self.begin = begin
        self.seconds = seconds
        self.requests: list[Request] = []

    @property
    def end(self) -> float:
        return self.begin + self.seconds * len(self.requests)


class Replica:
    """Advances from event to event; `wake` is when the next is due (None while idle)."""

    def __init__(self, limits: Limits, step_time: StepTime, front: FrontEnd) -> None:
        self.scheduler = Scheduler(limits)
        self.front = front
        self.queued_tokens = 0  # of unfinished requests: prompts not answered yet, outputs to come
        self.busy_seconds = 0.0
        self.refused: list[tuple[str, str]] = []
        self._step_time = step_time
        self._overlap = limits.overlap
        self._turns: deque[_Turn] = deque()
        self._flight: deque[tuple[StepPlan, float, float]] = deque()  # plan, seconds, end
        self._device_free = 0.0
        self._waiting_for_commit = False

    @property
    def wake(self) -> float | None:
        """When to call `advance` next."""
        if self._flight and self._waiting_for_commit:
            return self._flight[0][2]
        return self._turns[0].end if self._turns else None

    def send(self, request: Request, now: float) -> None:
        """A request arrives at the server."""
        turns = self._turns
        if not turns or now > turns[-1].begin:
            begin = max(now + self.front.gather, turns[-1].end if turns else 0.0)
            turns.append(_Turn(begin, self.front.request))
        turns[-1].requests.append(request)
        self.queued_tokens += len(request.prompt) + request.params.max_tokens

    def advance(self, now: float) -> list[TokenEvent]:
        """Handle what is due at `now`. Returns the news of a step that ended, if one did."""
        events: list[TokenEvent] = []
        if self._waiting_for_commit and self._flight:
            plan, seconds, _ = self._flight.popleft()
            tokens = (GENERATED,) * sum(s.sample for s in plan.sequences)
            events = self.scheduler.commit(StepResult(plan.step, tokens, seconds), now)
            self.busy_seconds += seconds
        self._waiting_for_commit = False
        self._take_in(now)
        while not self._waiting_for_commit:
            plan_made = self.scheduler.plan(now)
            if plan_made is not None:
                self._submit(plan_made, now)
            elif not self._flight:
                break
            self._waiting_for_commit = plan_made is None or len(self._flight) > self._overlap
        return events

    def finished(self, request: Request) -> None:
        """The request has ended; its tokens are no load any more."""
        self.queued_tokens -= len(request.prompt) + request.params.max_tokens

    def _submit(self, plan: StepPlan, now: float) -> None:
        seconds = self._step_time.seconds(StepLoad.of(plan))
        self._device_free = max(self._device_free, now) + seconds
        self._flight.append((plan, seconds, self._device_free))

    def _take_in(self, now: float) -> None:
        while self._turns and self._turns[0].end <= now:
            for request in self._turns.popleft().requests:
                try:
                    self.scheduler.add(request, now)
                except ValueError as error:
                    self.refused.append((request.id, str(error)))
                    self.finished(request)
