"""Runs the sequences of one HTTP request on the engine and gives their text as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from uuid import uuid4

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from app.access.terms import TIMEOUT_HEADER, TTFT_HEADER, Terms, expired, unmeetable
from app.flights.record import Flight
from app.http.errors import ApiError
from app.outputs.choice import Choice, Delta
from app.outputs.logprobs import Entry
from app.outputs.usage import usage_of
from app.service import Service
from app.telemetry.timings import Phases, Timings, timings_of
from app.turns.parts import Part, Turn
from batching.core.types import FinishReason, Request, SamplingParams, TokenEvent
from batching.engine.client import EngineDeadError, RequestStream

Take = Callable[[int, Delta], object]  # of a choice's index what it gained


@dataclass(frozen=True)
class Job:
    """One sequence to generate and the choice that its tokens become."""

    prompt: list[int]
    params: SamplingParams
    choice: Choice


@dataclass
class Collected:
    """All deltas of a choice, put together."""

    texts: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    finish: str | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def turn(self) -> Turn:
        """What a chat's model said, put together from its parts."""
        return Turn.of(self.parts) if self.parts else Turn(self.text)

    def add(self, delta: Delta) -> None:
        """The next one."""
        self.texts.append(delta.text)
        self.entries += delta.entries
        self.parts += delta.parts
        self.finish = delta.finish
        self.stop_reason = delta.stop_reason


class Generation:
    """The sequences of one HTTP request; job i is choice i of the response.

    `start` admits and submits them; `close` must follow, whatever happens, and frees whatever is
    still held. When the client goes away, the engine is told at once.
    """

    def __init__(self, service: Service, jobs: list[Job], samples: int, flight: Flight) -> None:
        self.jobs = jobs
        self._flight = flight
        self._service = service
        self._samples = samples
        self._queued: set[int] = set()  # jobs without their first event
        self._streams: list[RequestStream] = []
        self._remaining = len(jobs)  # choices that have not ended
        self._take: Take | None = None  # while somebody follows
        self._ended: asyncio.Future[None] | None = None
        self._held = False
        self._watcher: asyncio.Task[None] | None = None
        self._heard = False  # the engine sent something
        self._terms = Terms()
        self._timer: asyncio.TimerHandle | None = None
        self.forecast: float | None = None  # seconds until every choice has its first token
        self.position = 0  # sequences that will have theirs before
        self._ending = FinishReason.ABORT  # of choices that are open when this closes

    @classmethod
    def start(
        cls,
        service: Service,
        jobs: list[Job],
        samples: int,
        receive: Receive,
        terms: Terms,
        flight: Flight,
    ) -> Generation:
        """Submit `jobs`, which come in groups of `samples` with the same prompt.

        Raises `ApiError` (no room, or not in time) and `EngineDeadError`.
        """
        self = cls(service, jobs, samples, flight)
        self._terms = terms
        service.admission.admit([len(job.prompt) for job in jobs], service.engine.stats)
        self._queued = set(range(len(jobs)))
        requests = self._requests()
        service.flights.depart(flight, requests[0])
        try:
            self._check_deadline(requests)
            terms.quota.take_prompt(self._prompt_tokens)
            for index, request in enumerate(requests):
                stream = service.engine.submit(request)
                stream.on_news = partial(self._on_news, index)
                self._streams.append(stream)
                service.backlog.join(request)
                service.flights.submitted(flight, request)
            self._set_timer()
        except Exception:
            self._ending = FinishReason.ERROR
            self.close()
            raise
        self._watcher = asyncio.create_task(self._watch(receive))
        return self

    @property
    def _prompt_tokens(self) -> int:
        """Each prompt counts once."""
        return sum(len(job.prompt) for job in self.jobs[:: self._samples])

    def _requests(self) -> list[Request]:
        name, arrival, terms = uuid4().hex, self._service.clock(), self._terms
        return [
            Request(
                id=f"{name}-{i}",
                prompt=job.prompt,
                params=job.params,
                arrival=arrival,
                priority=terms.priority,
                tenant=terms.tenant,
                deadline=terms.deadline,
                end_by=terms.end_by,
                salt=terms.salt,
            )
            for i, job in enumerate(self.jobs)
        ]

    async def follow(self, take: Take) -> None:
        """Have `take` called with each delta as it comes, until every choice has ended.

        That happens within the engine's message, so it must be quick; what it raises is raised
        here. Raises `ApiError` and `EngineDeadError` when the engine failed, `ClientDisconnect`
        when nobody listens any more.
        """
        self._ended = asyncio.get_running_loop().create_future()
        self._take = take
        self._take_all()
        try:
            await self._ended
        except (ApiError, EngineDeadError):
            self._ending = FinishReason.ERROR
            raise
        finally:
            self._take = None

    def hold(self, held: bool) -> None:
        """While held, nothing is taken: what the engine generates merges in the streams."""
        self._held = held
        if not held:
            self._take_all()

    async def collect(self) -> list[Collected]:
        """Every choice's whole output. Raises as `follow`."""
        results = [Collected() for _ in self.jobs]
        await self.follow(lambda index, delta: results[index].add(delta))
        return results

    def close(self) -> None:
        """Abort what still runs and record how each choice ended. Idempotent."""
        self._take = None
        if self._watcher is not None:
            self._watcher.cancel()
        if self._timer is not None:
            self._timer.cancel()
        for index in list(self._queued):
            self._leave_queue(index)
        for stream, job in zip(self._streams, self.jobs, strict=False):
            stream.cancel()
            stream.on_news = _nobody_follows  # the engine's client may be about to call it
            reason = job.choice.finish or self._ending.value
            self._service.flights.lane_ended(stream.request.id, reason, job.choice.tokens)
        if self._streams:
            counts = [job.choice.tokens for job in self.jobs]
            self._service.metrics.generation_ended(counts, self._samples)
        self._streams = []
        self._flight.usage = usage_of(self.jobs, self._samples)
        self._service.flights.arrive(self._flight)

    def timings(self) -> Timings:
        """How long it took so far."""
        return timings_of(Phases.of(self._flight.lanes), usage_of(self.jobs, self._samples))

    def _take_all(self) -> None:
        for index in range(len(self._streams)):
            self._on_news(index)

    def _on_news(self, index: int) -> None:
        """A stream has something to take."""
        stream, choice = self._streams[index], self.jobs[index].choice
        try:
            while self._take is not None and not self._held and (event := stream.take()):
                if choice.finish is not None:
                    return  # by a stop string that the engine had not heard of
                delta = self._feed(index, event)
                if delta.finish is not None:
                    self._remaining -= 1
                    stream.cancel()
                self._take(index, delta)
                if not self._remaining:
                    self._end(None)
        except Exception as error:
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        """Nobody follows any more."""
        self._take = None
        assert self._ended is not None
        if self._ended.done():
            return  # cancelled
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    def _feed(self, index: int, event: TokenEvent) -> Delta:
        """Give a choice its event, and count."""
        if event.finish is FinishReason.EXPIRED:
            raise self._expired()
        choice = self.jobs[index].choice
        before = choice.tokens
        delta = choice.feed(event)
        if choice.aborted:
            raise ClientDisconnect
        metrics = self._service.metrics
        metrics.generation_tokens += choice.tokens - before
        self._terms.quota.tokens.take(choice.tokens - before)
        if self._queued:
            self._leave_queue(index)
            if not self._queued and self.forecast is not None:
                seconds = self._service.clock() - self._streams[index].request.arrival
                metrics.forecast_came_true(self.forecast, seconds)
        if not self._heard:
            self._heard = True
            metrics.generation_started(self._samples, self._prompt_tokens)
        metrics.cached_tokens += event.cached_tokens or 0
        return delta

    def _leave_queue(self, index: int) -> None:
        if index in self._queued:
            self._queued.discard(index)
            self._service.admission.release(len(self.jobs[index].prompt))
            if index < len(self._streams):
                self._service.backlog.leave(self._streams[index].request)

    # -- deadlines ------------------------------------------------------------------------------

    def _check_deadline(self, requests: list[Request]) -> None:
        """Raises `ApiError` if the first tokens will not come in time, or the time is over."""
        service, deadline = self._service, self._terms.deadline
        ahead = service.backlog.ahead_of(requests[0])
        self.position = ahead.requests
        self.forecast = service.backlog.first_token_seconds(ahead, requests, self._samples)
        if deadline is None:
            return
        left = deadline - service.clock()
        if left <= 0:
            raise self._expired()
        # Alone it is tried whatever the forecast: what is never computed corrects no forecast.
        if self.forecast is None or self.forecast <= left or service.backlog.is_idle:
            return
        service.admission.rejections["deadline_unmeetable"] += 1
        service.metrics.deadline_misses["refused"] += 1
        raise unmeetable(self.forecast, left)

    def _set_timer(self) -> None:
        """The engine drops what is late; this is for when there is none, or it is slow to say."""
        times = [self._terms.end_by, self._terms.deadline if self._queued else None]
        due = min((t for t in times if t is not None), default=None)
        if due is not None:
            delay = max(due - self._service.clock(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay, self._on_time)

    def _on_time(self) -> None:
        end_by = self._terms.end_by
        if self._queued or (end_by is not None and self._service.clock() >= end_by):
            for stream in self._streams:
                stream.cancel(FinishReason.EXPIRED)
        else:
            self._set_timer()

    def _expired(self) -> ApiError:
        self._service.metrics.deadline_misses["unserved" if self._queued else "timeout"] += 1
        end_by = self._terms.end_by
        over = end_by is not None and self._service.clock() >= end_by
        return expired(TIMEOUT_HEADER if over else TTFT_HEADER)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._held = False
        for stream in self._streams:
            stream.cancel()


def _nobody_follows() -> None:
    """What a closed generation's streams still bring is for nobody."""
