"""Replicas, a router and requests on one virtual clock. Equal inputs give equal outcomes."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from batching.core.step_time import StepTime
from batching.core.types import FinishReason, Limits, Request, SamplingParams
from loadtest.events import Outcome
from loadtest.measure import summarize
from loadtest.slo import Slo
from loadtest.twin.replica import FrontEnd, News, Replica
from loadtest.twin.routing import Router

_CLIENT_SECONDS = 0.0005  # between a response and the next request of a closed loop


@dataclass(frozen=True, slots=True)
class Job:
    """One request to simulate. The prompt is made when it is sent, so that a day fits in memory."""

    prompt: Callable[[], list[int]]
    output: int
    group: str = "all"
    offset: float = 0.0
    then: Job | None = None  # what the same user asks after the answer
    think: float = 0.0  # seconds from the answer before to this


class Fleet:
    """Simulates jobs on replicas. May be used for several runs, the clock and caches going on.

    With `every_token` False outcomes keep the times of the first and last token only.
    """

    def __init__(
        self,
        limits: Limits,
        step_time: StepTime,
        router: Router,
        replicas: int = 1,
        front: FrontEnd | None = None,
        *,
        every_token: bool = True,
    ) -> None:
        front = front or FrontEnd()
        self.replicas = [Replica(limits, step_time, front) for _ in range(replicas)]
        self.samples: list[dict[str, float]] = []
        self.now = 0.0
        self._router = router
        self._every_token = every_token
        self._heap: list[tuple[float, int, int]] = []  # time, replica, serial number of the wake-up
        self._serials = [0] * replicas
        self._open: dict[str, tuple[Outcome, Request, int, Job]] = {}
        self.later: list[Outcome] = []  # of jobs that followed another
        self._following: list[tuple[float, int, Job]] = []  # heap: time, serial number
        self._sent = 0
        self._sample_every = 0.0
        self._sample_next = 0.0

    def open_loop(self, jobs: Sequence[Job], sample_every: float = 1.0) -> list[Outcome]:
        """Send each job at its offset from now. Outcomes in the order of jobs; those of what they
        lead to are in `later`."""
        start = self.now
        self._begin_samples(sample_every)
        outcomes = []
        for job in jobs:
            due = start + job.offset
            self._run_until(due)
            outcomes.append(self._send(job, due))
        self._run_until(float("inf"))
        return outcomes

    def closed_loop(
        self, jobs: Iterable[Job], concurrency: int, sample_every: float = 1.0
    ) -> list[Outcome]:
        """Keep `concurrency` jobs, each with what it leads to, in flight. Outcomes in the order of
        sending; `later` as in an open loop."""
        self._begin_samples(sample_every)
        waiting = iter(jobs)
        outcomes = []
        due: list[float] = [self.now] * concurrency
        heapq.heapify(due)
        while True:
            while due:
                at = due[0]
                ended = self._run_until(at, stop_at_end=True)
                if ended:  # somebody becomes free before
                    for time in ended:
                        heapq.heappush(due, time + _CLIENT_SECONDS)
                    continue
                heapq.heappop(due)
                job = next(waiting, None)
                if job is not None:
                    outcomes.append(self._send(job, at))
            ended = self._run_until(float("inf"), stop_at_end=True)
            if not ended:
                return outcomes
            due = [time + _CLIENT_SECONDS for time in ended]
            heapq.heapify(due)

    def summary(self, outcomes: Sequence[Outcome], slo: Slo | None = None) -> dict[str, Any]:
        """Figures of outcomes, without gaps between tokens where those were not kept."""
        found = summarize(outcomes, slo)
        if not self._every_token:
            for part in (found, *found.get("groups", {}).values()):
                part["latency_ms"]["itl"] = None
        return found

    def _send(self, job: Job, now: float) -> Outcome:
        self.now = max(self.now, now)
        name = str(self._sent)
        self._sent += 1
        prompt = job.prompt()
        request = Request(name, prompt, SamplingParams(max_tokens=job.output), now)
        outcome = Outcome(
            sent=now,
            ended=now,
            scheduled=now,
            status=200,
            chunk_times=[],
            input_tokens=len(prompt),
            output_tokens=0,
            cached_tokens=0,
            asked_input=len(prompt),
            asked_output=job.output,
            group=job.group,
        )
        place = 0
        if len(self.replicas) > 1:
            place = self._router.choose(prompt, self.replicas)
        replica = self.replicas[place]
        was = replica.wake
        replica.send(request, now)
        self._open[name] = outcome, request, place, job
        if replica.wake != was:
            self._schedule(place)
        return outcome

    def _schedule(self, place: int) -> None:
        wake = self.replicas[place].wake
        if wake is not None:
            self._serials[place] += 1
            heapq.heappush(self._heap, (wake, place, self._serials[place]))

    def _run_until(self, end: float, stop_at_end: bool = False) -> list[float]:
        """Handle all events before `end`. With `stop_at_end` return as soon as requests ended: the
        times at which their clients knew."""
        while (event := self._next()) <= end and event != float("inf"):
            if self._following and self._following[0][0] <= event:
                due, _, job = heapq.heappop(self._following)
                self.later.append(self._send(job, due))
                continue
            now, place, serial = heapq.heappop(self._heap)
            if serial != self._serials[place]:
                continue  # another wake-up has replaced this one
            self._sample(now)
            self.now = max(self.now, now)
            replica = self.replicas[place]
            ended = self._deliver(replica.advance(now), replica.front.reply)
            ended += self._refuse(replica, now)
            self._schedule(place)
            if ended and stop_at_end:
                return ended
        return []

    def _next(self) -> float:
        """When something happens next."""
        heaps = (self._heap, self._following)
        return min((heap[0][0] for heap in heaps if heap), default=float("inf"))

    def _deliver(self, news: Sequence[News], delay: float) -> list[float]:
        """News reach the clients. Returns when those knew whose requests ended."""
        ended = []
        for events, times in news:
            heard = [time + delay for time in times]
            for event in events:
                outcome = self._open[event.id][0]
                if event.cached_tokens:
                    outcome.cached_tokens = event.cached_tokens
                if event.tokens:
                    assert outcome.output_tokens is not None
                    outcome.output_tokens += len(event.tokens)
                    if self._every_token:
                        outcome.chunk_times += heard
                    else:
                        outcome.chunk_times[1:] = heard[-1:]
                if event.finish is not None:
                    ended += self._end(event.id, event.finish, heard[-1])
        return ended

    def _end(self, name: str, why: FinishReason, now: float) -> list[float]:
        """A request has ended. Returns when, if its user asks for nothing more."""
        outcome, request, place, job = self._open.pop(name)
        outcome.ended = now
        outcome.finish = why.value
        self.replicas[place].finished(request)
        if job.then is None:
            return [now]
        due = now + _CLIENT_SECONDS + job.then.think
        heapq.heappush(self._following, (due, self._sent, job.then))
        return []

    def _refuse(self, replica: Replica, now: float) -> list[float]:
        ended = []
        while replica.refused:
            name, why = replica.refused.pop()
            outcome, *_ = self._open.pop(name)
            outcome.ended, outcome.error, outcome.status, outcome.detail = now, "HTTP 400", 400, why
            ended.append(now)
        return ended

    def _begin_samples(self, every: float) -> None:
        self.samples = []
        self._sample_every, self._sample_next = every, self.now

    def _sample(self, now: float) -> None:
        """Gauges as the server would tell them, summed (blocks: averaged) over replicas, at all
        times of sampling until now."""
        while self._sample_next <= now:
            for replica in self.replicas:
                self._deliver(replica.catch_up(self._sample_next), replica.front.reply)
            stats = [replica.scheduler.stats() for replica in self.replicas]
            used, total = sum(s.blocks_used for s in stats), sum(s.blocks_total for s in stats)
            gauges: dict[str, Any] = {
                "t": self._sample_next,
                "running": sum(s.running for s in stats),
                "waiting": sum(s.waiting for s in stats),
                "kv": used / total,
            }
            self.samples.append(gauges)
            self._sample_next += self._sample_every
