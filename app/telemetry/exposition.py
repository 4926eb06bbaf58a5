"""`GET /metrics`: the counters of all models as one text."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from app.served import Served


class FrontEnd(ProcessCollector):
    """The front end's process under Prometheus' own names, and what its event loop has to do."""

    def collect(self) -> Iterator[Metric]:
        yield from super().collect()
        help = "Tasks of the front end's event loop; as many as before once all requests ended."
        tasks = len(asyncio.all_tasks())
        yield GaugeMetricFamily("slipstream_event_loop_tasks", help, value=tasks)


_FRONT_END = FrontEnd(registry=None)


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
    models = [model.metrics for model in served.models]
    text = generate_latest(Merged([*models, _FRONT_END]))
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
