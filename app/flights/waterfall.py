"""A flight as it is shown: what happened when, and beside whom."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from app.flights.record import Ahead, Chunk, Flight, Lane, Step
from app.flights.recorder import FlightRecorder, may_see
from app.flights.words import amount, duration

# The stages of a request, in order; a pause interrupts one of the engine's.
RECEIVING, TOKENISING, GRAMMAR = "receiving", "tokenising", "grammar"
QUEUED, PREFILL, DECODE, DELIVERING = "queued", "prefill", "decode", "delivering"

_SURPRISING = 2.0  # times the forecast: the machine was busy with something else
_LEARNT_STEPS = 100  # before, forecasts are guesses


class Span(msgspec.Struct):
    """A stretch of the waterfall. `start` counts from when the request came, in seconds."""

    what: str
    start: float
    seconds: float
    note: str = ""
    sequence: int | None = None  # of which choice; none: of the whole request
    step: int | None = None


class Queue(msgspec.Struct):
    """How a sequence waited for its first step. Seconds of steps are by what was lacking."""

    seconds: float
    behind_requests: int
    behind_tokens: int
    behind: list[str]
    running: int
    steps: int
    prompt_tokens_computed: int
    lacked_slots_seconds: float
    lacked_blocks_seconds: float
    lacked_tokens_seconds: float


class Gap(msgspec.Struct):
    """The longest time between two tokens."""

    seconds: float
    step: int | None
    why: str


class Decode(msgspec.Struct):
    """From the first token on, and the load that the steps carried."""

    seconds: float
    tokens: int
    seconds_per_token: float
    steps: int
    mean_batch: float
    prompt_tokens_beside: int
    worst_gap: Gap | None


class SequenceRecord(msgspec.Struct):
    """One choice of the answer."""

    state: str
    finish: str | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    max_tokens: int
    prefill_steps: int
    preemptions: int
    restarts: int
    queue: Queue
    decode: Decode | None


class Waterfall(msgspec.Struct):
    """A whole request. `stages` sum to `seconds`; they are those of the slowest choice."""

    id: str
    request_id: str
    path: str
    streamed: bool
    state: str
    finish: str | None
    received: float
    seconds: float
    time_to_first_token: float | None
    client_stalls: int
    client_stalled_seconds: float
    stages: dict[str, float]
    spans: list[Span]
    sequences: list[SequenceRecord]
    verdict: str = ""


class View:
    """Shows flights to a tenant: others' requests have no names in it."""

    def __init__(self, recorder: FlightRecorder, tenant: str | None) -> None:
        self.recorder = recorder
        self.now = recorder.clock()
        self._tenant = tenant

    def name(self, lane_id: str) -> str:
        """What to call the request that a lane belongs to."""
        flight = self.recorder.flight_of(lane_id)
        if flight is None:
            return "an earlier request"
        return flight.answer_id if may_see(flight, self._tenant) else "another key's request"

    def queue(self, ahead: Ahead, lane: Lane) -> Queue:
        waits = self.recorder.is_waiting(lane)
        load = self.recorder.load.since(lane.load) if waits else lane.load
        return Queue(
            seconds=(lane.scheduled or self.end_of(lane)) - lane.arrival,
            behind_requests=ahead.requests,
            behind_tokens=ahead.tokens,
            behind=list(dict.fromkeys(map(self.name, ahead.lanes))),
            running=ahead.running,
            steps=load.steps,
            prompt_tokens_computed=load.chunk_tokens,
            lacked_slots_seconds=load.slots,
            lacked_blocks_seconds=load.blocks,
            lacked_tokens_seconds=load.tokens,
        )

    def decode(self, lane: Lane) -> Decode | None:
        if lane.decoding is None:
            return None
        load = lane.decoding if lane.finish else self.recorder.load.since(lane.decoding)
        gaps = lane.tokens - 1
        worst = None
        if lane.worst:
            step = lane.worst_step
            worst = Gap(lane.worst, None if step is None else step.number, self._why(lane))
        return Decode(
            seconds=lane.last - lane.first,
            tokens=lane.tokens,
            seconds_per_token=(lane.last - lane.first) / gaps if gaps else 0.0,
            steps=load.steps,
            mean_batch=load.sequences / load.steps if load.steps else 0.0,
            prompt_tokens_beside=load.chunk_tokens,
            worst_gap=worst,
        )

    def end_of(self, lane: Lane) -> float:
        """When it ended, or now."""
        return lane.ended or self.now

    def _why(self, lane: Lane) -> str:
        """What made the longest gap."""
        step = lane.worst_step
        if step is None:
            return ""
        until = step.summary.ended
        for pause in lane.pauses:
            if pause.began < until and (pause.ended or until) > until - lane.worst:
                if pause.what == "preempted":
                    return f"step {pause.step} gave its place to others"
                return "the engine was restarted"
        if step.seconds < lane.worst / 2:
            outside = duration(lane.worst - step.seconds)
            return f"{outside} passed outside of steps, before step {step.number}"
        said = f"step {step.number} took {duration(step.seconds)}"
        others = [(count, id) for id, _, count in step.summary.chunks if id != lane.id]
        if not others:
            said += f" with {amount(step.summary.sequences, 'sequence')}"
            return said + _surprise(step)
        count, id = max(others)
        cause = f"{self.name(id)} prefilled {amount(count, 'token')}"
        said += f"{_surprise(step)}; {cause}" if _surprise(step) else f" because {cause}"
        if len(others) > 1:
            rest = sum(count for count, _ in others) - count
            said += f" and {amount(len(others) - 1, 'other')} {rest:,}"
        return said


def _surprise(step: Step) -> str:
    """Says so if a step took far longer than what it was made of explains."""
    familiar = step.number >= _LEARNT_STEPS and step.forecast > 0
    if not familiar or step.seconds < _SURPRISING * step.forecast:
        return ""
    return f", where {duration(step.forecast)} were forecast"


def state_of(lane: Lane) -> str:
    """Where a lane is."""
    if lane.finish is not None:
        return "ended"
    if lane.ended:
        return DELIVERING
    if lane.paused is not None:
        return lane.paused.what
    return DECODE if lane.first else PREFILL if lane.scheduled else QUEUED


def leader(flight: Flight) -> int:
    """Index of the lane that took longest: the answer waited for it."""
    ends = [lane.ended or float("inf") for lane in flight.lanes]
    return ends.index(max(ends))


def stages(view: View, flight: Flight, lane: Lane) -> Iterator[tuple[str, float, float]]:
    """(stage, begin, end) of a flight as one of its lanes went through it, without gaps."""
    end, done = view.end_of(lane), flight.ended or view.now
    yield RECEIVING, flight.received, flight.began
    compiled = flight.tokenised or flight.admitted  # the latter where there is no grammar
    yield TOKENISING, flight.began, compiled
    yield GRAMMAR, compiled, flight.admitted
    begin = flight.admitted
    for stage, until in ((QUEUED, lane.scheduled), (PREFILL, lane.first), (DECODE, end)):
        until = min(until or end, end)
        for pause in lane.pauses:
            left, right = max(pause.began, begin), min(pause.ended or end, until)
            if left < right:
                yield stage, begin, left
                yield pause.what, left, right
                begin = right
        if begin < until:
            yield stage, begin, until
            begin = until
    yield DELIVERING, begin, max(done, begin)


def waterfall(view: View, flight: Flight) -> Waterfall:
    """All that is known of a flight but its verdict."""
    lead = flight.lanes[leader(flight)]
    sums: dict[str, float] = {}
    for stage, begin, end in stages(view, flight, lead):
        if end > begin:
            sums[stage] = sums.get(stage, 0.0) + end - begin
    firsts = [lane.first for lane in flight.lanes if lane.first]
    return Waterfall(
        id=flight.answer_id,
        request_id=flight.request_id,
        path=flight.path,
        streamed=flight.streamed,
        state="ended" if flight.ended else state_of(lead),
        finish=flight.finish,
        received=flight.received_at,
        seconds=(flight.ended or view.now) - flight.received,
        time_to_first_token=min(firsts) - flight.received if firsts else None,
        client_stalls=flight.stalls,
        client_stalled_seconds=flight.seconds_stalled(view.now),
        stages=sums,
        spans=sorted(_spans(view, flight), key=lambda span: span.start),
        sequences=[_sequence(view, flight, lane) for lane in flight.lanes],
    )


def _sequence(view: View, flight: Flight, lane: Lane) -> SequenceRecord:
    causes = [pause.what for pause in lane.pauses]
    return SequenceRecord(
        state=state_of(lane),
        finish=lane.finish,
        prompt_tokens=lane.prompt,
        cached_tokens=lane.cached,
        output_tokens=lane.tokens,
        max_tokens=lane.max_tokens,
        prefill_steps=len(lane.chunks) + lane.later_chunks,
        preemptions=causes.count("preempted"),
        restarts=causes.count("engine restart"),
        queue=view.queue(flight.ahead, lane),
        decode=view.decode(lane),
    )


def _spans(view: View, flight: Flight) -> Iterator[Span]:
    for index, lane in enumerate(flight.lanes):
        for stage, begin, end in stages(view, flight, lane):
            of_all = stage in (RECEIVING, TOKENISING, GRAMMAR, DELIVERING)
            if end <= begin or (of_all and (index or stage == DELIVERING)):
                continue
            sequence = None if of_all else index
            if stage != PREFILL:
                yield Span(stage, begin - flight.received, end - begin, sequence=sequence)
        for chunk in lane.chunks:
            yield _chunk(flight, index, chunk)
        if lane.later_chunks:
            note = f"{amount(lane.later_tokens, 'token')} in {lane.later_chunks:,} more steps"
            start = lane.chunks[-1].step.summary.ended - flight.received
            yield Span(PREFILL, start, lane.later_seconds, note, index)
    end = max(map(view.end_of, flight.lanes))
    if flight.ended > end:
        yield Span(DELIVERING, end - flight.received, flight.ended - end)


def _chunk(flight: Flight, index: int, chunk: Chunk) -> Span:
    step = chunk.step
    note = f"{amount(chunk.tokens, 'token')} from position {chunk.start:,}{_company(step)}"
    what = "recomputed" if chunk.again else PREFILL
    start, seconds = step.summary.began, step.summary.ended - step.summary.began
    return Span(what, start - flight.received, seconds, note, index, step.number)


def _company(step: Step) -> str:
    others = step.summary.sequences - 1
    return f", with {amount(others, 'other sequence')}" if others else ""
