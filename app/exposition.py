"""`GET /metrics`: the counters of all models as one text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from app.served import Served


class Merged(Collector):
    """Several models' metrics: each family once, with every model's samples."""

    def __init__(self, collectors: Sequence[Collector]) -> None:
        self._collectors = collectors

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for collector in self._collectors:
            for family in collector.collect():
                if family.name in families:
                    families[family.name].samples.extend(family.samples)
                else:
                    families[family.name] = family
        yield from families.values()


async def scrape(served: Served, request: Request) -> Response:
    """All metrics, as text that Prometheus reads."""
    text = generate_latest(Merged([model.metrics for model in served.models]))
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
