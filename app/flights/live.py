"""`GET /debug/live`: what the page at `/` shows, a few times a second, while somebody watches."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from app.flights.record import Flight, Lane
from app.flights.recorder import FlightRecorder, may_see
from app.flights.waterfall import state_of
from app.http.errors import ApiError
from app.http.query import parameters
from app.http.sse import EventStream, Source, StreamEnd, event_bytes
from app.middleware import sees, tenant_of
from app.served import Served
from app.service import Service
from batching.core.types import EngineStats

PERIOD_SECONDS = 0.25  # frequent enough for eyes; a frame takes about a millisecond to make
WINDOW_SECONDS = 30.0  # of steps and ended requests that a frame tells of
RATE_SECONDS = 3.0  # over which rates are means
MAX_LANES = 64  # in a frame: more than fit a screen
MAX_WATCHERS = 16  # each has its own frames made
MAX_OF_A_KEY = 4  # of these, so that no holder keeps out the others


_Entry = tuple[Flight, Lane]


class Blocks(msgspec.Struct):
    total: int
    used: int
    cached: int  # of those not used


class Percentiles(msgspec.Struct):
    """Seconds, over the window. Absent where nothing was measured."""

    p50: float
    p95: float
    p99: float


class Rates(msgspec.Struct):
    """Per second, and shares of the time: in the model, without work, and the rest."""

    output_tokens: float
    prompt_tokens: float
    steps: float
    model: float
    idle: float
    host: float


class LiveStep(msgspec.Struct, array_like=True):
    number: int
    began: float
    ended: float
    sequences: int
    chunk_tokens: int


class LiveChunk(msgspec.Struct, array_like=True):
    began: float
    ended: float
    tokens: int
    again: bool


class LiveLane(msgspec.Struct):
    """One sequence; times are on the clock of `now`, 0 where they did not come yet."""

    key: str
    id: str
    state: str
    prompt: int
    cached: int
    tokens: int
    arrival: float
    scheduled: float
    first: float
    last: float
    ended: float
    chunks: list[LiveChunk]
    pauses: list[tuple[str, float, float]]


class Frame(msgspec.Struct):
    """`steps` are those since the last frame; lanes are all of the window, as far as they fit."""

    now: float
    model: str
    failure: str | None
    restarts: int
    running: int
    waiting: int
    blocks: Blocks
    rates: Rates | None
    time_to_first_token: Percentiles | None
    inter_token: Percentiles | None
    steps: list[LiveStep]
    lanes: list[LiveLane]
    hidden: int  # lanes that run or wait and did not fit


class _Moment(NamedTuple):
    """Totals at a time, to take differences of."""

    now: float
    stats: EngineStats


class Watch:
    """One watcher's view of a service."""

    def __init__(self, service: Service, tenant: str | None) -> None:
        self._service = service
        self._recorder = service.flights
        self._tenant = tenant
        self._last_step = -1
        self._moments: deque[_Moment] = deque()

    def frame(self) -> Frame:
        """What is new."""
        recorder, stats = self._recorder, self._service.engine.stats
        now = recorder.clock()
        since = now - WINDOW_SECONDS
        shown, hidden = self._lanes(since)
        return Frame(
            now=now,
            model=self._service.model_name,
            failure=recorder.engine_failure,
            restarts=self._service.engine.restarts,
            running=stats.running,
            waiting=stats.waiting,
            blocks=Blocks(stats.blocks_total, stats.blocks_used, stats.blocks_cached),
            rates=self._rates(_Moment(now, stats)),
            time_to_first_token=percentiles([(s, 1) for s in first_tokens(recorder, since)]),
            inter_token=percentiles(token_gaps(recorder, since)),
            steps=self._new_steps(since),
            lanes=shown,
            hidden=hidden,
        )

    def _new_steps(self, since: float) -> list[LiveStep]:
        new = []
        for step in reversed(self._recorder.steps):
            summary = step.summary
            if step.number <= self._last_step or summary.ended < since:
                break
            new.append(
                LiveStep(
                    step.number, summary.began, summary.ended, summary.sequences, step.chunk_tokens
                )
            )
        new.reverse()
        if new:
            self._last_step = new[-1].number
        return new

    def _lanes(self, since: float) -> tuple[list[LiveLane], int]:
        """Those that run, then those that wait, then those that ended; and how many are left."""
        running: list[_Entry] = []
        waiting: list[_Entry] = []
        for flight in self._recorder.open.values():
            if may_see(flight, self._tenant):
                for lane in flight.lanes:
                    runs = lane.scheduled or lane.ended
                    (running if runs else waiting).append((flight, lane))
        ended = (
            (flight, lane)
            for flight in self._recorder.newest(self._tenant)
            if flight.ended > since
            for lane in flight.lanes
        )
        shown = list(islice(chain(running, waiting, ended), MAX_LANES))
        hidden = max(0, len(running) + len(waiting) - MAX_LANES)
        return [_lane(flight, lane, since) for flight, lane in shown], hidden

    def _rates(self, moment: _Moment) -> Rates | None:
        moments = self._moments
        moments.append(moment)
        while len(moments) > 2 and moments[1].now < moment.now - RATE_SECONDS:
            moments.popleft()
        before, after = moments[0].stats, moment.stats
        seconds = moment.now - moments[0].now
        if seconds < PERIOD_SECONDS or after.steps < before.steps:
            return None

        def rate(name: str) -> float:
            return (getattr(after, name) - getattr(before, name)) / seconds

        # Totals move when a step has ended: of one that takes seconds, a mean may be above 1.
        model = min(rate("forward_seconds"), 1.0)
        idle = min(rate("idle_seconds"), 1.0 - model)
        busy = 0.0 if after.steps == before.steps else 1.0 - model - idle
        return Rates(
            rate("generation_tokens"), rate("prompt_tokens"), rate("steps"), model, idle, busy
        )


def _lane(flight: Flight, lane: Lane, since: float) -> LiveLane:
    chunks = [
        LiveChunk(c.step.summary.began, c.step.summary.ended, c.tokens, c.again)
        for c in lane.chunks
        if c.step.summary.ended > since
    ]
    return LiveLane(
        key=lane.id,
        id=flight.answer_id,
        state=state_of(lane),
        prompt=lane.prompt,
        cached=lane.cached,
        tokens=lane.tokens,
        arrival=lane.arrival,
        scheduled=lane.scheduled,
        first=lane.first,
        last=lane.last,
        ended=lane.ended,
        chunks=chunks,
        pauses=[(p.what, p.began, p.ended or 0.0) for p in lane.pauses],
    )


def first_tokens(recorder: FlightRecorder, since: float) -> Iterator[float]:
    """Seconds to the first token, of sequences that got it lately."""
    for flight in chain(recorder.open.values(), reversed(recorder.ended)):
        if flight.ended and flight.ended < since:
            return
        for lane in flight.lanes:
            if lane.first > since:
                yield lane.first - flight.received


def token_gaps(recorder: FlightRecorder, since: float) -> list[tuple[float, int]]:
    """(seconds since the step before, sequences that decoded) of each late step that had some.

    Whatever decodes has a token in every step, so this is the time between tokens without looking
    at any.
    """
    gaps = []
    after = None
    for step in reversed(recorder.steps):
        if after is not None:
            decodes = after.sequences - len(after.chunks)
            if decodes:
                gaps.append((after.ended - step.summary.ended, decodes))
        after = step.summary
        if after.ended < since:
            break
    return gaps


def percentiles(weighted: Sequence[tuple[float, int]]) -> Percentiles | None:
    """Of values that were seen so many times."""
    if not weighted:
        return None
    ordered = sorted(weighted)
    total = sum(times for _, times in ordered)
    found, seen, wanted = [], 0, deque((0.5, 0.95, 0.99))
    for value, times in ordered:
        seen += times
        while wanted and seen >= wanted[0] * total:
            wanted.popleft()
            found.append(value)
    return Percentiles(*found)


async def live(served: Served, request: Request) -> Response:
    """Server-sent events named `frame`, until the watcher goes or the server drains."""
    parameters(request, set())
    if served.generator is None:
        served.refuse_generation()
    watchers, tenant = served.generator.flights.watchers, tenant_of(request.scope)
    if watchers.total() >= MAX_WATCHERS or (tenant and watchers[tenant] >= MAX_OF_A_KEY):
        message = f"{watchers[tenant]} with this key and {watchers.total()} in all watch already"
        raise ApiError(message, status=429, code="too_many_watchers", headers={"retry-after": "5"})
    watchers[tenant] += 1

    def close() -> None:
        watchers[tenant] -= 1

    watch = Watch(served.generator, sees(request.scope))
    ending = StreamEnd(b"", lambda error: b"event: error\ndata: " + error.body() + b"\n\n")
    return EventStream(_frames(served, watch, request), close, ending)


def _frames(served: Served, watch: Watch, request: Request) -> Source:
    async def source(stream: EventStream) -> bytes:
        while not served.draining:
            if not stream.full:
                stream.write(event_bytes("frame", watch.frame()))
            try:
                async with asyncio.timeout(PERIOD_SECONDS):
                    while (await request.receive())["type"] != "http.disconnect":
                        pass
                break
            except TimeoutError:
                pass
        return b""

    return source
