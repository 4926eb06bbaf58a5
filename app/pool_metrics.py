"""Prometheus metrics of a pooling model, under vLLM's names where it has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.histogram import REQUEST_EDGES, STEP_TOKEN_EDGES, Histogram, length_edges
from batching.core.types import PoolRequest, PoolResult

if TYPE_CHECKING:
    from app.admission import Admission
    from app.pool_model import PoolEngine

_FINISH_REASONS = ("stop", "abort", "error")
_REJECTIONS = ("max_num_queued_reqs", "max_num_queued_tokens")


class PoolMetrics(Collector):
    """All counters of one pooling model. A request here is a text.

    `on_batch` belongs to the engine client's callback. `prompt_tokens` advances by exactly what
    responses report as usage.
    """

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.prompt_tokens = 0
        self.finished: Counter[str] = Counter()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._engine: PoolEngine | None = None
        self._admission: Admission | None = None
        self._make_histograms(1 << 20)

    def _make_histograms(self, max_model_len: int) -> None:
        seconds = REQUEST_EDGES
        self._e2e = Histogram("vllm:e2e_request_latency_seconds", "Arrival to end.", seconds)
        self._queue = Histogram("vllm:request_queue_time_seconds", "Arrival to batch.", seconds)
        self._inference = Histogram("vllm:request_inference_time_seconds", "Batch.", seconds)
        self._lengths = Histogram(
            "vllm:request_prompt_tokens", "Tokens.", length_edges(max_model_len)
        )
        self._step_tokens = Histogram(
            "vllm:iteration_tokens_total", "Tokens per batch.", STEP_TOKEN_EDGES
        )
        self._histograms = [v for v in vars(self).values() if isinstance(v, Histogram)]

    def serve(self, engine: PoolEngine, admission: Admission, max_model_len: int) -> None:
        """From now on there is an engine to read gauges from."""
        self._engine, self._admission = engine, admission
        self._make_histograms(max_model_len)

    def ended(self, lengths: Sequence[int], reason: str) -> None:
        """The texts of a call have ended."""
        self.finished[reason] += len(lengths)
        for length in lengths:
            self._lengths.observe(length)

    def on_batch(self, texts: Sequence[tuple[PoolRequest, PoolResult]], tokens: int) -> None:
        """Time those texts of a batch of so many tokens that somebody still waits for."""
        for request, result in texts:
            self._e2e.observe(result.finished - request.arrival)
            self._queue.observe(result.scheduled - request.arrival)
            self._inference.observe(result.finished - result.scheduled)
        self._step_tokens.observe(tokens)

    def collect(self) -> Iterator[Metric]:
        """All families, read now."""
        engine, admission = self._engine, self._admission
        running, waiting = engine.counts() if engine is not None else (0, 0)
        yield self._gauge("vllm:num_requests_running", "Texts computed now.", running)
        yield self._gauge("vllm:num_requests_waiting", "Texts not yet computed.", waiting)
        for name, help, value in (
            ("vllm:prompt_tokens", "Tokens of answered texts.", self.prompt_tokens),
            ("slipstream_engine_restarts", "Engines restarted.", engine.restarts if engine else 0),
            ("slipstream_resumed_streams", "Resumed.", engine.resumed_streams if engine else 0),
        ):
            counter = CounterMetricFamily(name, help, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), value)
            yield counter
        finished = {reason: self.finished[reason] for reason in _FINISH_REASONS}
        yield self._by("vllm:request_success", "Ended.", "finished_reason", finished)
        rejections = admission.rejections if admission is not None else Counter()
        rejected = {reason: rejections[reason] for reason in _REJECTIONS}
        yield self._by("vllm:admission_rejections", "Refused with 429.", "reason", rejected)
        for histogram in self._histograms:
            yield histogram.family(self._labels)

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _by(self, name: str, help: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(name, help, labels=[*self._labels, label])
        for key, value in values.items():
            family.add_metric([*self._labels.values(), key], value)
        return family
