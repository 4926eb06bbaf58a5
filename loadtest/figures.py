"""The figures that runs are compared by: across repetitions, rates, versions and predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# Name to where it is in a summary, its unit, and whether more is better.
FIGURES: dict[str, tuple[tuple[str, ...], str, bool]] = {
    "output tokens/s": (("throughput", "output_tokens_per_second"), "", True),
    "requests/s": (("throughput", "requests_per_second"), "", True),
    "goodput, requests/s": (("goodput", "requests_per_second"), "", True),
    "TTFT p50": (("latency_ms", "ttft", "p50"), "ms", False),
    "TTFT p95": (("latency_ms", "ttft", "p95"), "ms", False),
    "TTFT p99": (("latency_ms", "ttft", "p99"), "ms", False),
    "TPOT p50": (("latency_ms", "tpot", "p50"), "ms", False),
    "TPOT p99": (("latency_ms", "tpot", "p99"), "ms", False),
    "ITL p99": (("latency_ms", "itl", "p99"), "ms", False),
    "E2E p50": (("latency_ms", "e2e", "p50"), "ms", False),
    "E2E p99": (("latency_ms", "e2e", "p99"), "ms", False),
}
# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


def figures(summary: dict[str, Any]) -> dict[str, float]:
    """The comparable figures that a summary has."""
    found = {}
    for name, (path, _, _) in FIGURES.items():
        value: Any = summary
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            found[name] = float(value)
    return found


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean of repetitions and half the width of its 95 % confidence interval (Student's t)."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return {"mean": mean, "half_width": math.inf}
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
    t = _T95[count - 2] if count - 2 < len(_T95) else 1.96 + 2.5 / (count - 1)
    return {"mean": mean, "half_width": t * deviation / math.sqrt(count)}


def confidence(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Intervals of every figure that all repetitions have."""
    runs = [figures(summary) for summary in summaries]
    return {
        name: interval([run[name] for run in runs])
        for name in FIGURES
        if all(name in run for run in runs)
    }
