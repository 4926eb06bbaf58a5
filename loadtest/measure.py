"""Outcomes in, figures out. All times in milliseconds, all rates per second.

- TTFT: scheduled sending to first text. E2E: scheduled sending to the end of the response.
- TPOT: (last text - first text) / (output tokens - 1), one value a request.
- ITL: gap between consecutive events with text, one value a gap.
- Failed requests count in `errors`, not in latencies or throughput.
- Fairness is Jain's index over groups of the output tokens per second of e2e that a request of the
  group got on average (failed ones none): 1 is equal, 1/n is all for one of n.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from loadtest.events import Outcome
from loadtest.slo import Slo, goodput, tpot, ttft

PERCENTILES = (50, 90, 95, 99, 99.9)


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


def summarize(outcomes: Sequence[Outcome], slo: Slo | None = None) -> dict[str, Any]:
    """All figures of one run. Raises `ValueError` if there are no outcomes."""
    if not outcomes:
        raise ValueError("nothing was measured")
    good = [o for o in outcomes if o.error is None]
    seconds = max(o.ended for o in outcomes) - min(o.scheduled for o in outcomes)
    tokens_in = sum(o.input_tokens or 0 for o in good)
    tokens_out = sum(o.output_tokens or 0 for o in good)
    summary = {
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
    if slo is not None:
        summary["goodput"] = goodput(outcomes, slo, seconds)
    return summary | _of_groups(outcomes) | _of_json(good)


def _of_groups(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Latencies of each group and fairness between them, where there are several."""
    groups: dict[str, list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault(o.group, []).append(o)
    if len(groups) < 2:
        return {}
    figures: dict[str, dict[str, Any]] = {
        name: {
            "requests": len(members),
            "service_tokens_per_second": math.fsum(map(_service, members)) / len(members),
            "latency_ms": _latencies([o for o in members if o.error is None]),
        }
        for name, members in sorted(groups.items())
    }
    services = [f["service_tokens_per_second"] for f in figures.values()]
    return {"groups": figures, "fairness": jain(services)}


def _service(outcome: Outcome) -> float:
    seconds = outcome.ended - outcome.scheduled
    if outcome.error is not None or seconds <= 0:
        return 0.0
    return (outcome.output_tokens or 0) / seconds


def jain(shares: Sequence[float]) -> float | None:
    """Jain's fairness index; None if nobody got anything."""
    squares = math.fsum(x * x for x in shares)
    return math.fsum(shares) ** 2 / (len(shares) * squares) if squares else None


def _of_json(good: Sequence[Outcome]) -> dict[str, Any]:
    asked = [o for o in good if o.json_asked]
    if not asked:
        return {}
    return {"json": {"asked": len(asked), "valid": sum(_is_json(o.text) for o in asked)}}


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError:
        return False
    return True


def _latencies(good: Sequence[Outcome]) -> dict[str, dict[str, float] | None]:
    return {
        "ttft": distribution(s * 1e3 for s in map(ttft, good) if s is not None),
        "tpot": distribution(s * 1e3 for s in map(tpot, good) if s is not None),
        "itl": distribution((b - a) * 1e3 for o in good for a, b in pairwise(o.chunk_times)),
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
        found["JSON asked for, other text given"] += o.json_asked and not _is_json(o.text)
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
