"""One simulated server: the production scheduler and block pool, and a step time for a worker.

It mirrors the engine's loop (`batching/engine/loop.py`): take in what arrived, plan, run, commit;
with overlap one more step is planned while one runs. Nothing here decides anything. While steps are
alike, their times are worked out ahead, and the scheduler leaps when somebody comes or ends.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, islice

import msgspec

from batching.core.leap import LeapingScheduler
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


News = tuple[list[TokenEvent], Sequence[float]]  # each event has a token for each time, or none


class Replica:
    """Advances from event to event; `wake` is when the next is due (None while idle)."""

    def __init__(self, limits: Limits, step_time: StepTime, front: FrontEnd) -> None:
        self.scheduler = LeapingScheduler(limits)
        self.front = front
        self.queued_tokens = 0  # of unfinished requests: prompts not answered yet, outputs to come
        self.busy_seconds = 0.0
        self.refused: list[tuple[str, str]] = []
        self._step_time = step_time
        self._overlap = limits.overlap
        self._turns: deque[_Turn] = deque()
        self._flight: deque[StepPlan] = deque()
        # Of the steps in flight, and of those after them that will be alike if nobody comes.
        self._seconds: list[float] = []
        self._ends: list[float] = []
        self._newest = StepLoad(0, 0, 0, 0)  # load of the step planned last
        self._waiting_for_commit = False

    @property
    def wake(self) -> float | None:
        """When to call `advance` next."""
        turn = self._turns[0].end if self._turns else None
        if not (self._flight and self._waiting_for_commit):
            return turn
        alike = len(self._ends) - len(self._flight)
        if turn is not None:
            alike = min(alike, bisect_left(self._ends, turn))
        return self._ends[alike]

    def send(self, request: Request, now: float) -> None:
        """A request arrives at the server."""
        turns = self._turns
        if not turns or now > turns[-1].begin:
            begin = max(now + self.front.gather, turns[-1].end if turns else 0.0)
            turns.append(_Turn(begin, self.front.request))
        turns[-1].requests.append(request)
        self.queued_tokens += len(request.prompt) + request.params.max_tokens

    def advance(self, now: float) -> list[News]:
        """Handle what is due at `now`. Returns the news since the last call, in order of time."""
        news = self.catch_up(now)
        del self._seconds[len(self._flight) :], self._ends[len(self._flight) :]
        if self._waiting_for_commit and self._flight:
            plan, seconds = self._flight.popleft(), self._seconds.pop(0)
            del self._ends[0]
            tokens = (GENERATED,) * sum(s.sample for s in plan.sequences)
            events = self.scheduler.commit(StepResult(plan.step, tokens, seconds), now)
            news.append((events, (now,)))
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
        self._look_ahead()
        return news

    def catch_up(self, now: float) -> list[News]:
        """Leap over the steps that ended before `now`, as far as they are alike."""
        count = min(bisect_left(self._ends, now), len(self._ends) - len(self._flight))
        if not count:
            return []
        seconds, ends = self._seconds[:count], self._ends[:count]
        del self._seconds[:count], self._ends[:count]
        self._flight = deque(self.scheduler.leap(seconds, ends, GENERATED))
        for time in seconds:
            self.busy_seconds += time
        tokens = (GENERATED,) * count
        names = self.scheduler.running
        return [([TokenEvent(name, tokens) for name in names], ends)]

    def finished(self, request: Request) -> None:
        """The request has ended; its tokens are no load any more."""
        self.queued_tokens -= len(request.prompt) + request.params.max_tokens

    def _submit(self, plan: StepPlan, now: float) -> None:
        self._newest = StepLoad.of(plan)
        seconds = self._step_time.seconds(self._newest)
        self._flight.append(plan)
        self._seconds.append(seconds)
        self._ends.append(max(self._ends[-1] if self._ends else 0.0, now) + seconds)

    def _look_ahead(self) -> None:
        """Work out when the steps will end that are like the newest."""
        count, rows = self.scheduler.steady_steps(), self._newest.rows
        if count:
            context = self._newest.context + rows
            seconds = self._step_time.decode_seconds(rows, context, count)
            self._seconds += seconds
            self._ends += islice(accumulate(seconds, initial=self._ends[-1]), 1, None)

    def _take_in(self, now: float) -> None:
        while self._turns and self._turns[0].end <= now:
            for request in self._turns.popleft().requests:
                try:
                    self.scheduler.add(request, now)
                except ValueError as error:
                    self.refused.append((request.id, str(error)))
                    self.finished(request)
