"""The course of a run: figures over time, and the part of it that was steady."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

from loadtest.events import Outcome
from loadtest.measure import distribution, percentile
from loadtest.slo import ttft

_BINS = 60
_STEADY_BINS = 100
_GROWTH = 1.5  # requests in flight, last third over middle third, that count as an overload
_ENOUGH = 20  # requests below which nothing is said about steadiness


def timeline(outcomes: Sequence[Outcome], bins: int = _BINS) -> list[dict[str, Any]]:
    """Figures of equal spans of time: sent, done, in flight, output tokens/s, TTFT."""
    start, end = _span(outcomes)
    width = (end - start) / bins
    rows: list[dict[str, Any]] = [
        {"t": (i + 0.5) * width, "sent": 0, "done": 0, "tokens": 0.0} for i in range(bins)
    ]
    firsts: list[list[float]] = [[] for _ in rows]

    def place(time: float) -> int:
        return min(bins - 1, max(0, int((time - start) / width)))

    for o in outcomes:
        rows[place(o.scheduled)]["sent"] += 1
        rows[place(o.ended)]["done"] += o.error is None
        if o.chunk_times and o.error is None:
            weight = (o.output_tokens or 0) / len(o.chunk_times)
            last, before = place(o.chunk_times[-1]), 0
            for index in range(place(o.chunk_times[0]), last + 1):
                after = bisect_left(o.chunk_times, start + (index + 1) * width)
                after = after if index < last else len(o.chunk_times)
                rows[index]["tokens"] += weight * (after - before)
                before = after
            firsts[place(o.scheduled)].append((o.chunk_times[0] - o.scheduled) * 1e3)
    flight = in_flight(outcomes, bins)
    for row, delays, count in zip(rows, firsts, flight, strict=True):
        row["in_flight"] = count
        row["output_tokens_per_second"] = row.pop("tokens") / width
        if delays:
            delays.sort()
            row["ttft_p50"], row["ttft_p95"] = percentile(delays, 50), percentile(delays, 95)
    return rows


def _span(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    start = min(o.scheduled for o in outcomes)
    return start, max(start + 1e-9, *(o.ended for o in outcomes))


def in_flight(outcomes: Sequence[Outcome], bins: int) -> list[float]:
    """Requests between their scheduled time and their end, at the middle of each span."""
    start, end = _span(outcomes)
    begins = sorted(o.scheduled for o in outcomes)
    ends = sorted(o.ended for o in outcomes)
    times = [start + (i + 0.5) * (end - start) / bins for i in range(bins)]
    return [float(bisect_right(begins, t) - bisect_left(ends, t)) for t in times]


def quantiles(values: Sequence[float], parts: int = 50) -> list[float]:
    """Every (100 / parts)-th percentile, the extremes included; empty for no values."""
    ordered = sorted(values)
    return [percentile(ordered, i * 100 / parts) for i in range(parts + 1)] if ordered else []


def steady(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    """Figures of the steady part: after filling up, before running dry. None if it has no such.

    The end is the last scheduled time. The beginning is White's MSER rule on requests in flight:
    cutting there makes the mean of the rest most certain, and at most half is cut. If the number
    in flight still grows at the end, requests came faster than they were served.
    """
    if len(outcomes) < _ENOUGH:
        return None
    start, end = _span(outcomes)
    last = max(o.scheduled for o in outcomes)
    width = (end - start) / _STEADY_BINS
    flight = in_flight(outcomes, _STEADY_BINS)[: max(4, math.ceil((last - start) / width))]
    begin = start + mser(flight) * width
    if last <= begin:
        return None
    tokens = math.fsum(
        (o.output_tokens or 0)
        / len(o.chunk_times)
        * (bisect_right(o.chunk_times, last) - bisect_left(o.chunk_times, begin))
        for o in outcomes
        if o.chunk_times and o.error is None
    )
    inside = [o for o in outcomes if begin <= o.scheduled <= last and o.error is None]
    third = len(flight) // 3
    middle, final = sum(flight[third : 2 * third]), sum(flight[-third:])
    return {
        "from": begin - start,
        "to": last - start,
        "output_tokens_per_second": tokens / (last - begin),
        "requests_per_second": len(inside) / (last - begin),
        "in_flight": sum(flight) / len(flight),
        "ttft_ms": distribution(s * 1e3 for s in map(ttft, inside) if s is not None),
        "growing": final > _GROWTH * middle and final > 3 * third,
    }


def mser(values: Sequence[float]) -> int:
    """How many first values to cut: the least variance of the rest over its squared length."""
    best, cut = math.inf, 0
    total, squares = math.fsum(values), math.fsum(v * v for v in values)
    count = len(values)
    for index, value in enumerate(values[: count // 2]):
        left = count - index
        score = (squares - total * total / left) / (left * left)
        if score < best * (1 - 1e-9):
            best, cut = score, index
        total -= value
        squares -= value * value
    return cut
