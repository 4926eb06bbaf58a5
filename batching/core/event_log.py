"""The scheduler's diary: every call that changed it, one JSON line each, and its replay.

Because the scheduler is pure, the calls reproduce the plans exactly, on any machine: a log is a
bug report that can be stepped through, and a test that an optimisation changed no decision. A log
that is cut in pieces goes on in each piece with the scheduler's whole state (`snapshot`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import msgspec

from batching.core.cost_model import CostModel, CostState
from batching.core.scheduler import Scheduler
from batching.core.snapshot import freeze, thaw
from batching.core.types import Limits, Request, StepPlan, StepResult, TokenEvent


class Started(msgspec.Struct, frozen=True, array_like=True, tag="start"):
    """First line of a new scheduler's log."""

    limits: Limits
    cost: CostState


class Continued(msgspec.Struct, frozen=True, array_like=True, tag="continue"):
    """First line of a piece that follows another one: the state after its last call."""

    state: Any


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


Line = Started | Continued | Added | Aborted | Expired | Planned | Committed


class ReplayError(ValueError):
    """A log cannot be replayed: it is malformed, or the plans made now are not those logged."""


class RecordingScheduler(Scheduler):
    """A scheduler that hands each call, as a line of JSON with its newline, to `write`.

    If `write` returns true, another piece of the log begins after the line, and it is given the
    first line of that. Calls that raise change nothing, and are not recorded.
    """

    def __init__(
        self,
        limits: Limits,
        cost_model: CostModel | None = None,
        *,
        write: Callable[[bytes], object],
    ) -> None:
        super().__init__(limits, cost_model)
        self._recorder = write
        self._write(Started(limits, self.cost_model.state()))

    def _write(self, line: Line) -> object:
        return self._recorder(_encode(line) + b"\n")

    def _record(self, line: Line) -> None:
        if self._write(line):
            self._write(Continued(freeze(self)))

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
        before = self._next_expiry
        events = super().expire(now)
        if self._next_expiry != before:  # else it was too early for anything
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


_encode = msgspec.json.Encoder().encode


class Replayed(NamedTuple):
    """A line of a log whose call was made again, the scheduler after it, and the call's events."""

    line: Line
    scheduler: Scheduler
    events: list[TokenEvent]


def replayed(lines: Iterable[bytes]) -> Iterator[Replayed]:
    """Make a log's calls again, one after the other, and compare plans with those logged.

    A last line without its newline was cut off by a crash, and is left out.

    Raises:
        ReplayError: at the first line that is malformed or whose plan comes out differently.
    """
    decode = msgspec.json.Decoder(Line).decode
    scheduler: Scheduler | None = None
    for number, text in enumerate(lines, start=1):
        if not text.endswith(b"\n"):
            return
        try:
            line = decode(text)
            if scheduler is None and not isinstance(line, Started | Continued):
                raise ValueError("the log does not begin with its start")
            scheduler, events = _call(scheduler, line)
        except Exception as error:  # whatever a foreign log can make the scheduler do
            raise ReplayError(f"line {number}: {error}") from error
        yield Replayed(line, scheduler, events)


def _call(scheduler: Scheduler | None, line: Line) -> tuple[Scheduler, list[TokenEvent]]:
    """Make one line's call. Raises `ValueError` if the plan is not the one logged."""
    if isinstance(line, Started):
        return Scheduler(line.limits, CostModel(line.cost)), []
    if isinstance(line, Continued):
        return thaw(line.state), []
    assert scheduler is not None
    events: list[TokenEvent] = []
    match line:
        case Added(now, request):
            scheduler.add(request, now)
        case Aborted(now, request_id):
            event = scheduler.abort(request_id, now)
            events = [] if event is None else [event]
        case Expired(now):
            events = scheduler.expire(now)
        case Committed(now, result):
            events = scheduler.commit(result, now)
        case Planned(now, logged):
            plan = scheduler.plan(now)
            if plan != logged:
                raise ValueError(_difference(plan, logged))
    return scheduler, events


def _difference(plan: StepPlan | None, logged: StepPlan | None) -> str:
    """Where two plans differ first."""
    if plan is None or logged is None or plan.step != logged.step:
        return f"planned {plan}, logged {logged}"
    pairs = zip_longest((*plan.sequences, *plan.inits), (*logged.sequences, *logged.inits))
    ours, theirs = next((a, b) for a, b in pairs if a != b)
    return f"step {plan.step}: planned {ours}, logged {theirs}"


def replay(lines: Iterable[bytes]) -> Iterator[StepPlan]:
    """The plans of a log, made again. Raises as `replayed`."""
    for line, _, _ in replayed(lines):
        if isinstance(line, Planned) and line.plan is not None:
            yield line.plan
