"""Prometheus metrics of a pooling model, under vLLM's names where it has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.access.admission import Admission
from app.access.quota import EXCEEDED
from app.engine_protocol import PoolEngine
from app.telemetry.engine_info import info_family
from app.telemetry.engine_metrics import engine_families
from app.telemetry.families import Families
from app.telemetry.histogram import REQUEST_EDGES, STEP_TOKEN_EDGES, Histogram, length_edges
from batching.core.types import PoolRequest, PoolResult
from batching.worker.pool_protocol import PoolCapabilities

_FINISH_REASONS = ("stop", "abort", "error")
_REJECTIONS = ("max_num_queued_reqs", "max_num_queued_tokens", EXCEEDED)


class PoolMetrics(Collector):
    """All counters of one pooling model. A request here is a text.

    `on_batch` belongs to the engine client's callback. `prompt_tokens` advances by exactly what
    responses report as usage.
    """

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.prompt_tokens = 0
        self.finished: Counter[str] = Counter()
        self._families = Families(model_name)
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

    def serve(
        self, engine: PoolEngine, admission: Admission, capabilities: PoolCapabilities
    ) -> None:
        """From now on there is an engine to read gauges from."""
        self._engine, self._admission = engine, admission
        self._make_histograms(capabilities.max_model_len)

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
        engine, admission, families = self._engine, self._admission, self._families
        running, waiting = engine.counts() if engine is not None else (0, 0)
        yield families.gauge("vllm:num_requests_running", "Texts computed now.", running)
        yield families.gauge("vllm:num_requests_waiting", "Texts not yet computed.", waiting)
        yield families.counter(
            "vllm:prompt_tokens", "Tokens of answered texts.", self.prompt_tokens
        )
        finished = {reason: self.finished[reason] for reason in _FINISH_REASONS}
        yield families.counters("vllm:request_success", "Ended texts.", "finished_reason", finished)
        rejections = admission.rejections if admission is not None else Counter()
        rejected = {reason: rejections[reason] for reason in _REJECTIONS}
        yield families.counters(
            "vllm:admission_rejections", "Refused with 429.", "reason", rejected
        )
        for histogram in self._histograms:
            yield histogram.family(families.labels)
        if engine is not None and (capabilities := engine.capabilities) is not None:
            phases, resumed = capabilities.phases, engine.resumed_streams
            yield from engine_families(families, engine.stats, phases, engine.restarts, resumed)
            yield info_family(families, capabilities)
