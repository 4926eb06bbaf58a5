"""How long a request waited, computed its prompts and generated, from what was recorded of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from app.flights.record import Lane
from app.outputs.usage import Usage


class Phases(NamedTuple):
    """When a request's phases began and ended (monotonic seconds), over all its sequences.

    0 stands for what has not happened.
    """

    arrival: float
    scheduled: float  # the first sequence is in a step
    first: float  # every sequence has its first token
    last: float  # the last token of all

    @classmethod
    def of(cls, lanes: Sequence[Lane]) -> Phases:
        """Of the sequences of one request; there is at least one."""
        scheduled = min((lane.scheduled for lane in lanes if lane.scheduled), default=0.0)
        firsts = [lane.first for lane in lanes]
        first = max(firsts) if all(firsts) else 0.0
        return cls(lanes[0].arrival, scheduled, first, max(lane.last for lane in lanes))

    @property
    def queue(self) -> float | None:
        """Seconds until the first step; None: there was none."""
        return self.scheduled - self.arrival if self.scheduled else None

    @property
    def prefill(self) -> float | None:
        """Seconds from there to the first tokens."""
        return self.first - self.scheduled if self.scheduled and self.first else None

    @property
    def decode(self) -> float | None:
        """Seconds from there to the last token."""
        return self.last - self.first if self.first else None


class Timings(msgspec.Struct):
    """What answers tell who asks for `timings`: llama.cpp's object, and the time in the queue."""

    queue_ms: float
    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


def timings_of(phases: Phases, usage: Usage) -> Timings:
    """Those of a request, with the counts that it reports."""
    cached, generated = usage.prompt_tokens_details.cached_tokens, usage.completion_tokens
    queue, prefill, decode = (
        1e3 * (seconds or 0.0) for seconds in (phases.queue, phases.prefill, phases.decode)
    )
    computed = usage.prompt_tokens - cached
    return Timings(
        round(queue, 3), cached,
        computed, round(prefill, 3), _ratio(prefill, computed), _ratio(1e3 * computed, prefill),
        generated, round(decode, 3), _ratio(decode, generated), _ratio(1e3 * generated, decode),
    )  # fmt: skip


def _ratio(of: float, by: float) -> float:
    return round(of / by, 3) if by else 0.0
