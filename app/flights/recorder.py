"""The flight recorder: listens to every step and remembers the last requests.

It is fed by the messages that the engine sends anyway. A token costs a look-up and a comparison; a
step, a few additions. What can be worked out later is worked out when somebody asks.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Protocol

from starlette.types import Scope

from app.engine_protocol import Engine
from app.flights.record import MAX_NAMED, Ahead, Flight, Lane, Load, Step
from batching.core.types import Request
from batching.engine.messages import StepOutput

# Ended sequences that are remembered: minutes of a busy server, in at most some 10 MB.
KEPT_LANES = 1024
# Steps that are remembered for what is shown live: the page shows half a minute, and steps of
# fewer than 8 ms are too fine to be seen in it.
KEPT_STEPS = 4096


class Timekeeper(Protocol):
    """Who is told of tokens and lanes (`app.telemetry.metrics.Metrics`)."""

    def first_token(self, seconds: float) -> None: ...
    def later_tokens(self, seconds: float, count: int) -> None: ...
    def lane_ended(self, lane: Lane, tokens: int) -> None: ...


class FlightRecorder:
    """All flights of one engine. `on_step` belongs to the engine client's callback."""

    def __init__(
        self,
        times: Timekeeper,
        clock: Callable[[], float] = time.monotonic,
        kept_lanes: int = KEPT_LANES,
    ) -> None:
        self._times = times
        self.clock = clock
        self.steps: deque[Step] = deque(maxlen=KEPT_STEPS)
        self.load = Load()
        self.open: dict[str, Flight] = {}  # by name, oldest first
        self.ended: deque[Flight] = deque()  # oldest first
        self._kept_lanes = kept_lanes
        self._ended_lanes = 0
        self._lanes: dict[str, Lane] = {}  # of open flights, by id
        self._waiting: dict[str, Lane] = {}  # of these, those that no step has touched
        self._waiting_tokens = self._waiting_flights = 0
        self._flights: dict[str, Flight] = {}  # open and ended, by name
        # By tenant and each of their names: a client may choose one that another's flight has.
        self._names: dict[tuple[str, str], Flight] = {}
        self.watchers: Counter[str] = Counter()  # of `/debug/live`, by tenant
        self._engine: Engine | None = None
        self._restarts = 0
        self._heard = clock()

    def serve(self, engine: Engine) -> None:
        """From now on this is the engine."""
        self._engine = engine

    # -- from the front end --------------------------------------------------------------------

    def board(self, scope: Scope, answer_id: str, *, streamed: bool) -> Flight:
        """A request that was found right; it is remembered from `depart` on."""
        state = scope["state"]
        now = self.clock()
        flight = state["flight"] = Flight(
            request_id=state["request_id"],
            answer_id=answer_id,
            path=scope["path"],
            tenant=state.get("tenant", ""),
            streamed=streamed,
            received=state["arrival"],
            received_at=time.time() - (now - state["arrival"]),
            began=now,
        )
        return flight

    def depart(self, flight: Flight, first: Request) -> None:
        """It was admitted; all its lanes have ids like that of the `first`."""
        flight.name = name = _flight_name(first.id)
        flight.admitted = first.arrival
        flight.ahead = Ahead(
            self._waiting_flights,
            self._waiting_tokens,
            len(self._lanes) - len(self._waiting),
            tuple(islice(self._waiting, MAX_NAMED)),
        )
        self.open[name] = self._flights[name] = flight
        for known in flight.names:
            self._names[flight.tenant, known] = flight

    def submitted(self, flight: Flight, request: Request) -> None:
        """A sequence of it was handed to the engine."""
        length = len(request.prompt)
        lane = Lane(request, flight.received, self.load)
        flight.lanes.append(lane)
        self._lanes[lane.id] = self._waiting[lane.id] = lane
        self._waiting_tokens += length
        self._waiting_flights += not flight.waiting
        flight.waiting += 1

    def lane_ended(self, request_id: str, finish: str, tokens: int) -> None:
        """A sequence's answer is over, after so many tokens that the client got."""
        lane = self._lanes.pop(request_id, None)
        if lane is None:
            return
        self._leave_queue(lane)
        lane.finish = finish
        lane.ended = lane.ended or self.clock()
        if (pause := lane.paused) is not None:
            pause.ended = lane.ended
        if lane.decoding is not None:
            lane.decoding = self.load.since(lane.decoding)
        self._times.lane_ended(lane, tokens)

    def arrive(self, flight: Flight) -> None:
        """A flight's answer is over, and its lanes' are. Idempotent."""
        if self.open.pop(flight.name, None) is None:
            return
        now = self.clock()
        flight.ended = now
        flight.unstall(now)
        self._ended_lanes += len(flight.lanes)
        if not flight.lanes:  # there was no engine
            self._forget(flight)
            return
        flight.finish = flight.lanes[0].finish
        self.ended.append(flight)
        while self._ended_lanes > self._kept_lanes and len(self.ended) > 1:
            self._forget(self.ended.popleft())

    def _forget(self, flight: Flight) -> None:
        self._ended_lanes -= len(flight.lanes)
        del self._flights[flight.name]
        for known in flight.names:
            if self._names.get((flight.tenant, known)) is flight:  # ids may be used again
                del self._names[flight.tenant, known]

    def _leave_queue(self, lane: Lane) -> None:
        if self._waiting.pop(lane.id, None) is not None:
            self._waiting_tokens -= lane.prompt
            lane.load = self.load.since(lane.load)
            if (flight := self.flight_of(lane.id)) is not None:
                flight.waiting -= 1
                self._waiting_flights -= not flight.waiting

    # -- from the engine -----------------------------------------------------------------------

    def on_step(self, output: StepOutput) -> None:
        """Take in a message of the engine."""
        step, now = None, self.clock()
        if self._engine is not None and self._engine.restarts != self._restarts:
            self._restarted(self._engine.restarts)
        self._heard = now
        if output.step is not None:
            now = output.step.ended
            stats = output.stats
            forecast = stats.predicted_step_seconds
            step = Step(stats.steps - 1, stats.step_seconds, forecast, output.step)
            self._take_step(step)
        lanes = self._lanes
        gaps: Counter[float] = Counter()  # tokens by the time since the one before: few differ
        for event in output.events:
            lane = lanes.get(event.id)
            if lane is None:
                continue
            if event.tokens:
                count = len(event.tokens)
                if lane.tokens:
                    gap = now - lane.last
                    gaps[gap / count] += count
                    if gap > lane.worst:
                        lane.worst, lane.worst_step = gap, step
                else:
                    self._first_token(lane, now)
                lane.last = now
                lane.tokens += count
            if event.cached_tokens is not None:
                lane.cached = event.cached_tokens
            if event.finish is not None:
                lane.ended = now
        for seconds, tokens in gaps.items():
            self._times.later_tokens(seconds, tokens)

    def _take_step(self, step: Step) -> None:
        for lane_id, start, count in step.summary.chunks:
            lane = self._lanes.get(lane_id)
            if lane is None:
                continue
            self._schedule(lane, step.summary.began)
            lane.computed(step, start, count)
        for lane_id in step.summary.preempted:
            if lane_id in self._lanes:
                self._lanes[lane_id].pause("preempted", step.summary.began, step.number)
        self.steps.append(step)
        self.load = self.load.after(step)

    def _schedule(self, lane: Lane, when: float) -> None:
        if not lane.scheduled:
            lane.scheduled = when
            self._leave_queue(lane)

    def _first_token(self, lane: Lane, now: float) -> None:
        self._schedule(lane, now)
        lane.first = now
        lane.decoding = self.load
        self._times.first_token(now - lane.received)

    def _restarted(self, restarts: int) -> None:
        """An engine died since it was heard last."""
        self._restarts = restarts
        for lane in self._lanes.values():
            if lane.arrival < self._heard:
                lane.pause("engine restart", self._heard)

    # -- to who asks ---------------------------------------------------------------------------

    @property
    def engine_failure(self) -> str | None:
        """Why no engine serves now."""
        return None if self._engine is None else self._engine.failure

    def find(self, name: str, tenant: str | None) -> Flight | None:
        """By any of its names. A tenant finds only its own flights; None finds all."""
        if tenant is not None:
            return self._names.get((tenant, name))
        return next((flight for flight in self.newest(None) if name in flight.names), None)

    def is_waiting(self, lane: Lane) -> bool:
        """No step has touched it, and it has not ended."""
        return lane.id in self._waiting

    def flight_of(self, lane_id: str) -> Flight | None:
        """The flight that a lane belongs to, if it is remembered."""
        return self._flights.get(_flight_name(lane_id))

    def newest(self, tenant: str | None) -> Iterator[Flight]:
        """All that are remembered and that `tenant` may see, open ones first, newest first."""
        for flights in (self.open.values(), self.ended):
            for flight in reversed(flights):
                if may_see(flight, tenant):
                    yield flight


def _flight_name(lane_id: str) -> str:
    return lane_id.rpartition("-")[0]


def may_see(flight: Flight, tenant: str | None) -> bool:
    """Whether a key's holder may know of a flight; None is one who may see all."""
    return tenant is None or flight.tenant == tenant
