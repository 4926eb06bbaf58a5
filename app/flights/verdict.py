"""Why a request took as long as it did, in one line."""

from __future__ import annotations

from collections.abc import Callable

from app.flights.record import Flight
from app.flights.waterfall import (
    DECODE,
    DELIVERING,
    GRAMMAR,
    PREFILL,
    QUEUED,
    RECEIVING,
    TOKENISING,
    Queue,
    SequenceRecord,
    View,
    Waterfall,
    leader,
    waterfall,
)
from app.flights.words import amount, duration

_NOTABLE_GAP = 3.0  # times the mean, and at least this many seconds: a gap that people see
_VISIBLE_SECONDS = 0.05


def tell(view: View, flight: Flight) -> Waterfall:
    """A flight's waterfall with its verdict."""
    told = waterfall(view, flight)
    told.verdict = verdict(told, leader(flight))
    return told


def verdict(w: Waterfall, index: int) -> str:
    """Names the stage that took longest and what it was about, for the choice that took longest."""
    lead = w.sequences[index]
    if not w.stages:
        return "nothing has happened yet"
    stage = max(w.stages, key=lambda name: w.stages[name])
    share = w.stages[stage] / w.seconds
    so_far = "" if w.state == "ended" else " so far"
    line = f"{share:.0%}".replace("%", " %")
    line += f" of {duration(w.seconds)}{so_far} {_WORDS[stage](w, lead)}"
    gap = None if lead.decode is None else lead.decode.worst_gap
    if gap is not None and gap.why and lead.decode is not None:
        mean = lead.decode.seconds_per_token
        if gap.seconds > max(_NOTABLE_GAP * mean, _VISIBLE_SECONDS):
            line += f"; the worst gap between tokens was {duration(gap.seconds)}: {gap.why}"
    return line


def _queued(w: Waterfall, lead: SequenceRecord) -> str:
    queue = lead.queue
    if queue.behind_requests:
        said = f"were spent queued behind {amount(queue.behind_requests, 'request')}"
        said += f" ({amount(queue.behind_tokens, 'prompt token')})"
    elif queue.running:
        said = f"were spent queued while {amount(queue.running, 'other sequence')} ran"
    else:
        return "were spent waiting for the engine"
    return said + _lacking(queue)


def _lacking(queue: Queue) -> str:
    lacked = {
        "; all sequence slots were taken": queue.lacked_slots_seconds,
        "; the KV cache had no room": queue.lacked_blocks_seconds,
        "; the steps before were full": queue.lacked_tokens_seconds,
    }
    said = max(lacked, key=lambda words: lacked[words])
    return said if lacked[said] else ""


def _prefill(w: Waterfall, lead: SequenceRecord) -> str:
    fresh = lead.prompt_tokens - lead.cached_tokens
    said = f"went into computing {amount(fresh, 'prompt token')}"
    return f"{said} in {amount(lead.prefill_steps, 'step')}"


def _decode(w: Waterfall, lead: SequenceRecord) -> str:
    decode = lead.decode
    if decode is None:
        return "went into the first token"
    said = f"went into generating {amount(decode.tokens, 'token')}"
    if decode.tokens > 1:
        said += f", {duration(decode.seconds_per_token)} each"
    others = decode.mean_batch - 1
    if others >= 0.05:
        said += f", in steps shared with {others:.1f} others on average"
    return said


def _preempted(w: Waterfall, lead: SequenceRecord) -> str:
    times = amount(lead.preemptions, "time")
    return f"passed while others had its place (preempted {times})"


def _delivering(w: Waterfall, lead: SequenceRecord) -> str:
    if w.client_stalls:
        return "passed until the client had read the answer"
    return "went into finishing the answer"


_WORDS: dict[str, Callable[[Waterfall, SequenceRecord], str]] = {
    RECEIVING: lambda w, lead: "passed until the request's body had come",
    TOKENISING: lambda w, lead: "went into tokenising the prompt",
    GRAMMAR: lambda w, lead: "went into compiling its grammar",
    QUEUED: _queued,
    PREFILL: _prefill,
    DECODE: _decode,
    DELIVERING: _delivering,
    "preempted": _preempted,
    "engine restart": lambda w, lead: "passed while the engine was restarted",
}
