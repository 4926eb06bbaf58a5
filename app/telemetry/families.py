"""Prometheus families of one model: each sample carries the model's labels."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

Family = type[GaugeMetricFamily] | type[CounterMetricFamily]


class Families:
    """Makes families by full name; counters are named without their `_total`."""

    def __init__(self, model_name: str) -> None:
        self.labels = {"model_name": model_name, "engine": "0"}  # as vLLM has them

    def gauge(self, name: str, help: str, value: float) -> Metric:
        """One value that goes up and down."""
        return self._plain(GaugeMetricFamily, name, help, value)

    def counter(self, name: str, help: str, value: float) -> Metric:
        """One value that only grows."""
        return self._plain(CounterMetricFamily, name, help, value)

    def gauges(self, name: str, help: str, label: str, values: Mapping[str, float]) -> Metric:
        """A gauge for each value of a label."""
        return self._by(GaugeMetricFamily, name, help, label, values)

    def counters(self, name: str, help: str, label: str, values: Mapping[str, float]) -> Metric:
        """A counter for each value of a label."""
        return self._by(CounterMetricFamily, name, help, label, values)

    def info(self, name: str, help: str, facts: Mapping[str, str]) -> Metric:
        """Facts as labels of a gauge that is always 1."""
        labels = {**self.labels, **facts}
        family = GaugeMetricFamily(name, help, labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        return family

    def _plain(self, kind: Family, name: str, help: str, value: float) -> Metric:
        family = kind(name, help, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family

    def _by(
        self, kind: Family, name: str, help: str, label: str, values: Mapping[str, float]
    ) -> Metric:
        family = kind(name, help, labels=[*self.labels, label])
        for key, value in values.items():
            family.add_metric([*self.labels.values(), key], value)
        return family
