"""A histogram that costs a bisection per observation, and vLLM's bucket edges made finer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from prometheus_client.metrics_core import HistogramMetricFamily

# Every edge of vLLM's is here, so that its dashboards and recording rules stay valid; the added
# low edges show what a small model on a fast machine does.
TTFT_EDGES = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25),
    *(0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_EDGES = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.035, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_EDGES = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0),
    *(10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKEN_EDGES = tuple(float(1 << i) for i in range(15))
SEQUENCE_EDGES = (0.0, *(float(1 << i) for i in range(11)))
N_EDGES = (1.0, 2.0, 5.0, 10.0, 20.0)
# How far forecasts are off, in seconds.
ERROR_EDGES = (
    *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
    *(10.0, 20.0, 60.0),
)


def length_edges(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, … up to `limit`."""
    edges, power = [], 1
    while power <= limit:
        edges += [float(m * power) for m in (1, 2, 5) if m * power <= limit]
        power *= 10
    return tuple(edges)


class Histogram:
    """Counts of observations at most each edge, and their sum."""

    def __init__(self, name: str, help: str, edges: Sequence[float]) -> None:
        self.name = name
        self._help = help
        self._edges = edges
        self._counts = [0] * (len(edges) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value` as if it had been seen `times` times."""
        self._counts[bisect_left(self._edges, value)] += times
        self._sum += value * times

    def family(self, labels: Mapping[str, str]) -> HistogramMetricFamily:
        """As the Prometheus client exposes it."""
        total, buckets = 0, []
        for edge, count in zip((*self._edges, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if edge == float("inf") else repr(float(edge)), float(total)))
        family = HistogramMetricFamily(self.name, self._help, labels=list(labels))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family


class SplitHistogram:
    """One histogram for each value of a label."""

    def __init__(
        self, name: str, help: str, edges: Sequence[float], label: str, values: Sequence[str]
    ) -> None:
        self._label = label
        self._parts = {value: Histogram(name, help, edges) for value in values}

    def observe(self, part: str, value: float) -> None:
        """Count `value` where the label is `part`."""
        self._parts[part].observe(value)

    def observe_error(self, forecast: float, seconds: float) -> None:
        """Count what was forecast and then took `seconds` as "early" or "late"."""
        error = seconds - forecast
        self.observe("late" if error > 0 else "early", abs(error))

    def family(self, labels: Mapping[str, str]) -> HistogramMetricFamily:
        """As the Prometheus client exposes it."""
        first, *others = (
            histogram.family({**labels, self._label: part})
            for part, histogram in self._parts.items()
        )
        for other in others:
            first.samples += other.samples
        return first
