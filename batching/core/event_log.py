"""The scheduler's diary: every call that changed it, one JSON line each, and its replay.

Because the scheduler is pure, the calls reproduce the plans exactly, on any machine: a log is a
bug report that can be stepped through, and a test that an optimisation changed no decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec

from batching.core.cost_model import CostModel, CostState
from batching.core.scheduler import Scheduler
from batching.core.types import Limits, Request, StepPlan, StepResult, TokenEvent


class Started(msgspec.Struct, frozen=True, array_like=True, tag="start"):
    """First line of a log."""

    limits: Limits
    cost: CostState


class Added(msgspec.Struct, frozen=True, array_like=True, tag="add"):
    """A call of `add` that was accepted."""

    now: float
    request: Request


class Aborted(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """A call of `abort`."""

    now: float
    id: str


class Expired(msgspec.Struct, frozen=True, array_like=True, tag="expire"):
    """A call of `expire` that ended requests."""

    now: float


class Planned(msgspec.Struct, frozen=True, array_like=True, tag="plan"):
    """A call of `plan` and what it returned."""

    now: float
    plan: StepPlan | None


class Committed(msgspec.Struct, frozen=True, array_like=True, tag="commit"):
    """A call of `commit`."""

    now: float
    result: StepResult


Line = Started | Added | Aborted | Expired | Planned | Committed


class ReplayError(ValueError):
    """A log cannot be replayed: it is malformed, or the plans made now are not those logged."""


class RecordingScheduler(Scheduler):
    """A scheduler that hands each call, as a line of JSON with its newline, to `write`.

    Calls that raise change nothing, and are not recorded.
    """

    def __init__(
        self,
        limits: Limits,
        cost_model: CostModel | None = None,
        *,
        write: Callable[[bytes], object],
    ) -> None:
        super().__init__(limits, cost_model)
        self._write = write
        self._encoder = msgspec.json.Encoder()
        self._record(Started(limits, self.cost_model.state()))

    def _record(self, line: Line) -> None:
        self._write(self._encoder.encode(line) + b"\n")

    def add(self, request: Request, now: float) -> None:
        """As `Scheduler.add`."""
        super().add(request, now)
        self._record(Added(now, request))

    def abort(self, request_id: str, now: float) -> TokenEvent | None:
        """As `Scheduler.abort`."""
        event = super().abort(request_id, now)
        self._record(Aborted(now, request_id))
        return event

    def expire(self, now: float) -> list[TokenEvent]:
        """As `Scheduler.expire`."""
        events = super().expire(now)
        if events:
            self._record(Expired(now))
        return events

    def plan(self, now: float) -> StepPlan | None:
        """As `Scheduler.plan`."""
        plan = super().plan(now)
        self._record(Planned(now, plan))
        return plan

    def commit(self, result: StepResult, now: float) -> list[TokenEvent]:
        """As `Scheduler.commit`."""
        events = super().commit(result, now)
        self._record(Committed(now, result))
        return events


def replay(lines: Iterable[bytes]) -> Iterator[StepPlan]:
    """Make a log's calls on a new scheduler; yields its plans as they are made.

    Raises:
        ReplayError: at the first line that is malformed or whose plan comes out differently.
    """
    decoder = msgspec.json.Decoder(Line)
    scheduler: Scheduler | None = None
    for number, text in enumerate(lines, start=1):
        try:
            line = decoder.decode(text)
        except msgspec.DecodeError as error:
            raise ReplayError(f"line {number}: {error}") from error
        if isinstance(line, Started):
            scheduler = Scheduler(line.limits, CostModel(line.cost))
            continue
        if scheduler is None:
            raise ReplayError(f"line {number}: the log does not begin with its start")
        match line:
            case Added(now, request):
                scheduler.add(request, now)
            case Aborted(now, request_id):
                scheduler.abort(request_id, now)
            case Expired(now):
                scheduler.expire(now)
            case Committed(now, result):
                scheduler.commit(result, now)
            case Planned(now, logged):
                plan = scheduler.plan(now)
                if plan != logged:
                    raise ReplayError(f"line {number}: planned {plan}, logged {logged}")
                if plan is not None:
                    yield plan
