"""Outcomes in, figures out. All times in milliseconds, all rates per second.

- TTFT: scheduled sending to first text. E2E: scheduled sending to the end of the response.
- TPOT: (last text - first text) / (output tokens - 1), one value a request.
- ITL: gap between consecutive events with text, one value a gap.
- Failed requests count in `errors`, not in latencies or throughput.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from loadtest.events import Outcome

PERCENTILES = (50, 90, 95, 99)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between closest ranks (numpy's default) of ascending values."""
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def distribution(values: Iterable[float]) -> dict[str, float] | None:
    """Mean, percentiles, extremes and count of some values; None if there are none."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {
        "mean": math.fsum(ordered) / len(ordered),
        **{f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES},
        "min": ordered[0],
        "max": ordered[-1],
        "count": len(ordered),
    }


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All figures of one run. Raises `ValueError` if there are no outcomes."""
    if not outcomes:
        raise ValueError("nothing was measured")
    good = [o for o in outcomes if o.error is None]
    seconds = max(o.ended for o in outcomes) - min(o.scheduled for o in outcomes)
    tokens_in = sum(o.input_tokens or 0 for o in good)
    tokens_out = sum(o.output_tokens or 0 for o in good)
    return {
        "seconds": seconds,
        "requests": {"sent": len(outcomes), "completed": len(good)},
        "errors": dict(Counter(o.error for o in outcomes if o.error is not None)),
        "error_examples": {o.error: o.detail for o in outcomes if o.error is not None},
        "tokens": {
            "input": tokens_in,
            "output": tokens_out,
            "cached": sum(o.cached_tokens or 0 for o in good),
        },
        "throughput": {
            "requests_per_second": len(good) / seconds,
            "output_tokens_per_second": tokens_out / seconds,
            "total_tokens_per_second": (tokens_in + tokens_out) / seconds,
        },
        "latency_ms": _latencies(good),
        "send_lag_ms": distribution((o.sent - o.scheduled) * 1e3 for o in outcomes),
        "disagreements": disagreements(good),
    }


def _latencies(good: Sequence[Outcome]) -> dict[str, dict[str, float] | None]:
    with_text = [o for o in good if o.chunk_times]
    return {
        "ttft": distribution((o.chunk_times[0] - o.scheduled) * 1e3 for o in with_text),
        "tpot": distribution(
            (o.chunk_times[-1] - o.chunk_times[0]) / (o.output_tokens - 1) * 1e3
            for o in with_text
            if o.output_tokens is not None and o.output_tokens > 1
        ),
        "itl": distribution((b - a) * 1e3 for o in with_text for a, b in pairwise(o.chunk_times)),
        "e2e": distribution((o.ended - o.scheduled) * 1e3 for o in good),
    }


def disagreements(good: Iterable[Outcome]) -> dict[str, int]:
    """Requests whose `usage` contradicts the stream or what was asked, by kind."""
    found: Counter[str] = Counter()
    for o in good:
        if o.output_tokens is None:
            found["no usage"] += 1
            continue
        found["more events with text than tokens"] += len(o.chunk_times) > o.output_tokens
        found["tokens but no text"] += o.output_tokens > 0 and not o.chunk_times
        found["more tokens than asked for"] += o.output_tokens > o.asked_output
        found["finish is length before the limit"] += (
            o.finish == "length" and o.output_tokens < o.asked_output
        )
        found["prompt tokens differ from those sent"] += (
            o.asked_input is not None and o.input_tokens != o.asked_input
        )
    return {kind: count for kind, count in found.items() if count}


def client_warnings(summary: dict[str, Any], cpu_share: float) -> list[str]:
    """Reasons to distrust the run because of the client; `cpu_share` is of one core, 0 to 1."""
    warnings = []
    lag, ttft = summary["send_lag_ms"], summary["latency_ms"]["ttft"]
    if ttft is not None and lag["p99"] > max(5.0, 0.1 * ttft["p50"]):
        warnings.append(f"requests left late: p99 {lag['p99']:.1f} ms after their time")
    if cpu_share > 0.8:
        warnings.append(f"the client used {cpu_share:.0%} of its core: it was the bottleneck")
    return warnings
