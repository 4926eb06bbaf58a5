"""What is kept of a request: times, counts and ids, never a word of what was said.

Times are monotonic seconds, as the engine's are. A flight is one HTTP request; it has a lane for
each sequence that the engine generates for it.
"""

from __future__ import annotations

from operator import sub
from typing import NamedTuple

from app.outputs.usage import Usage
from batching.core.types import Lack, Request, StepSummary

# A prompt of 128k tokens has some 250 chunks; of the later ones it is enough to know their sum.
MAX_CHUNKS = 32
MAX_PAUSES = 16  # who is preempted more often has been told the point
MAX_NAMED = 8  # of the requests ahead; more are counted


class Step(NamedTuple):
    """One step of the engine. Numbers go on when the engine is restarted."""

    number: int
    seconds: float  # in the worker
    forecast: float  # what these were thought to be; 0 if nothing was
    summary: StepSummary

    @property
    def chunk_tokens(self) -> int:
        """Tokens of prompts, and of what is computed again."""
        return sum(count for _, _, count in self.summary.chunks)


class Load(NamedTuple):
    """Totals over all steps so far; the difference of two says what happened between them."""

    steps: int = 0
    seconds: float = 0.0
    sequences: int = 0  # one counts as often as it took part
    chunk_tokens: int = 0
    slots: float = 0.0  # seconds of steps that somebody waited for, by what was lacking
    blocks: float = 0.0
    tokens: float = 0.0

    def after(self, step: Step) -> Load:
        """With one more step."""
        lack, seconds = step.summary.lack, step.seconds
        return Load(
            self.steps + 1,
            self.seconds + seconds,
            self.sequences + step.summary.sequences,
            self.chunk_tokens + step.chunk_tokens,
            self.slots + seconds * (lack is Lack.SLOTS),
            self.blocks + seconds * (lack is Lack.BLOCKS),
            self.tokens + seconds * (lack is Lack.TOKENS),
        )

    def since(self, before: Load) -> Load:
        """What happened since `before`."""
        return Load(*map(sub, self, before))


class Ahead(NamedTuple):
    """Who was there first when a request came."""

    requests: int = 0  # that waited
    tokens: int = 0  # of their prompts
    running: int = 0  # sequences
    lanes: tuple[str, ...] = ()  # of the first of those who waited


class Chunk(NamedTuple):
    """A share of a step in which a lane caught up."""

    step: Step
    start: int
    tokens: int
    again: bool  # it had been computed before


class Pause:
    """A time in which a lane had lost its place in the engine. `ended` is None while it lasts."""

    __slots__ = ("began", "ended", "step", "what")

    def __init__(self, what: str, began: float, step: int | None = None) -> None:
        self.what = what  # "preempted" or "engine restart"
        self.began = began
        self.ended: float | None = None
        self.step = step  # the step that others needed its slot or blocks for


class Lane:
    """One sequence. Times are 0 until they are known."""

    __slots__ = (
        "arrival", "cached", "chunks", "decoding", "ended", "finish", "first", "id",
        "last", "later_chunks", "later_seconds", "later_tokens", "load", "max_tokens", "pauses",
        "prompt", "received", "scheduled", "tokens", "worst", "worst_step",
    )  # fmt: skip

    def __init__(self, request: Request, received: float, load: Load) -> None:
        self.id = request.id
        self.prompt = len(request.prompt)
        self.max_tokens = request.params.max_tokens
        self.received = received  # the head of its HTTP request had come
        self.arrival = request.arrival  # in the engine's queue
        self.scheduled = self.first = self.last = self.ended = 0.0
        self.finish: str | None = None
        self.cached = 0
        self.tokens = 0  # generated
        self.chunks: list[Chunk] = []
        self.later_chunks = self.later_tokens = 0  # beyond `MAX_CHUNKS`
        self.later_seconds = 0.0
        self.pauses: list[Pause] = []
        self.worst = 0.0  # seconds between two tokens
        self.worst_step: Step | None = None  # the step that brought the second
        self.load = load  # when it arrived; from the first step on: until then, and since
        self.decoding: Load | None = None  # when its first token came, later: since

    @property
    def paused(self) -> Pause | None:
        """The pause it is in."""
        return self.pauses[-1] if self.pauses and self.pauses[-1].ended is None else None

    def pause(self, what: str, began: float, step: int | None = None) -> None:
        """It lost its place."""
        if len(self.pauses) < MAX_PAUSES and self.paused is None:
            self.pauses.append(Pause(what, began, step))

    def computed(self, step: Step, start: int, count: int) -> None:
        """A step computed a chunk of it."""
        if (pause := self.paused) is not None:
            pause.ended = step.summary.began
        if len(self.chunks) < MAX_CHUNKS:
            self.chunks.append(Chunk(step, start, count, bool(self.tokens or self.pauses)))
        else:
            self.later_chunks += 1
            self.later_tokens += count
            self.later_seconds += step.seconds


class Flight:
    """One HTTP request that reached the engine."""

    __slots__ = (
        "admitted", "ahead", "answer_id", "began", "ended", "finish", "lanes", "name", "path",
        "received", "received_at", "request_id", "stalled", "stalled_since", "stalls", "streamed",
        "tenant", "tokenised", "usage", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        *,
        request_id: str,
        answer_id: str,
        path: str,
        tenant: str,
        streamed: bool,
        received: float,
        received_at: float,
        began: float,
    ) -> None:
        self.request_id = request_id  # as in `x-request-id`
        self.answer_id = answer_id  # the `id` of the answer
        self.path = path
        self.tenant = tenant
        self.streamed = streamed
        self.received = received  # its head had come
        self.received_at = received_at  # the same, in seconds since 1970
        self.began = began  # its body had come and was found right
        self.tokenised = self.admitted = self.ended = 0.0
        self.name = ""  # what its lanes' ids begin with
        self.ahead = Ahead()
        self.waiting = 0  # lanes that no step has touched
        self.finish: str | None = None
        self.usage: Usage | None = None  # when it has ended
        self.lanes: list[Lane] = []
        self.stalled = 0.0  # seconds in which the client did not read
        self.stalls = 0
        self.stalled_since: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What it can be asked for by."""
        return self.name, self.answer_id, self.request_id

    def stall(self, now: float) -> None:
        """The client does not read: what is sent to it piles up."""
        if self.stalled_since is None and not self.ended:
            self.stalled_since = now
            self.stalls += 1

    def unstall(self, now: float) -> None:
        """It reads again, or has gone."""
        if self.stalled_since is not None:
            self.stalled += now - self.stalled_since
            self.stalled_since = None

    def seconds_stalled(self, now: float) -> float:
        """So far."""
        return self.stalled + (0.0 if self.stalled_since is None else now - self.stalled_since)
