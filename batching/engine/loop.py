"""The engine's one loop: inbox, plan, execute, commit, outbox.

With overlap 0 (CPU) each step is planned, run and committed before the next is planned. With
overlap 1 (GPU) the next step is planned and submitted while the last one runs:

    overlap 0   plan 1 | run 1 | commit 1 | plan 2 | run 2 | commit 2
    overlap 1   plan 1 | plan 2 | commit 1 | plan 3 | commit 2          (host)
                       |     run 1     |     run 2    |   run 3         (device)

Both give the same tokens: a decoding request gains exactly one token a step, so its next step can
be planned before that token is known.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import msgspec

from batching.core.scheduler import Scheduler
from batching.core.types import FinishReason, StepPlan, TokenEvent
from batching.engine.messages import FromEngine, Starting, StepOutput, Submit
from batching.worker.protocol import Worker

HEARTBEAT_SECONDS = 1.0
_LONG_STEP_SECONDS = 0.25  # the supervisor grants shorter ones enough time unasked
# A forecast is not trusted in the first steps, nor for so many times the tokens of any before.
_FIRST_STEPS = 2
_FAMILIAR_FACTOR = 2
_SLOWNESS_DECAY = 0.9


class EngineLoop:
    """Drives one scheduler and one worker. Single-threaded; owns neither clock nor transport.

    `receive(timeout)` returns the `Submit`s that arrived, waiting up to `timeout` seconds for the
    first; `send` hands a message to the front end.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        worker: Worker,
        receive: Callable[[float], list[Submit]],
        send: Callable[[FromEngine], None],
        overlap: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._worker = worker
        self._receive = receive
        self._send = send
        self._overlap = overlap
        self._clock = clock
        self._in_flight: deque[Any] = deque()
        self._most_tokens = 0  # in a step so far
        self._slowness = 0.0  # seconds of recent steps' slowest: the cost model is slow to learn
        # Seconds by stage, as `EngineStats` names them.
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._lap = clock()

    def run_forever(self) -> None:
        """Serve until `receive` or the worker raises."""
        while True:
            self.run_once()

    def run_once(self) -> None:
        """Take in what arrived, advance by at most one step, and report what happened."""
        busy = bool(self._in_flight) or self._scheduler.has_work
        submits = self._receive(0.0 if busy else HEARTBEAT_SECONDS)
        if not busy:
            self._stage("idle_seconds")
        events = self._take_in(submits) + self._scheduler.expire(self._clock())
        self._stage("inbox_seconds")
        committed = self._step()
        if not (busy or submits):
            self._scheduler.check_integrity()  # idle is the time to look for leaks
        if committed is not None or events or not busy:  # every step is a heartbeat
            step = None if committed is None else self._scheduler.last_step
            stats = msgspec.structs.replace(self._scheduler.stats(), **self._spent)
            self._send(StepOutput(events + (committed or []), stats, step))
            self._stage("outbox_seconds")

    def _stage(self, name: str) -> None:
        """Book the time since the last call."""
        now = self._clock()
        self._spent[name] += now - self._lap
        self._lap = now

    def _take_in(self, submits: list[Submit]) -> list[TokenEvent]:
        events = []
        for submit in submits:
            for request in submit.requests:
                try:
                    self._scheduler.add(request, self._clock())
                except ValueError as error:
                    events.append(
                        TokenEvent(request.id, finish=FinishReason.ERROR, error=str(error))
                    )
            for request_id in submit.aborts:
                event = self._scheduler.abort(request_id, self._clock())
                if event is not None:
                    events.append(event)
        return events

    def _step(self) -> list[TokenEvent] | None:
        """Plan and commit as far as overlap allows. Returns None if no step was committed."""
        plan = self._scheduler.plan(self._clock())
        self._stage("plan_seconds")
        if plan is not None:
            self._announce(plan)
            self._in_flight.append(self._worker.submit(plan))
            self._stage("submit_seconds")
        if plan is None and not self._in_flight and self._scheduler.has_work:
            raise RuntimeError("the scheduler has work, plans none, and waits for nothing")
        if self._in_flight and (plan is None or len(self._in_flight) > self._overlap):
            result = self._worker.wait(self._in_flight.popleft())
            self._stage("wait_seconds")
            self._slowness = max(result.seconds, _SLOWNESS_DECAY * self._slowness)
            events = self._scheduler.commit(result, self._lap)
            self._stage("commit_seconds")
            return events
        return None

    def _announce(self, plan: StepPlan) -> None:
        """Say what the supervisor must know if this step never ends."""
        tokens = plan.token_count
        seconds = max(self._scheduler.forecast, self._slowness)
        familiar = plan.step >= _FIRST_STEPS and tokens <= _FAMILIAR_FACTOR * self._most_tokens
        self._most_tokens = max(self._most_tokens, tokens)
        if plan.inits or not familiar or seconds > _LONG_STEP_SECONDS:
            admitted = [init.id for init in plan.inits]
            self._send(Starting(plan.step, seconds, familiar, admitted))
