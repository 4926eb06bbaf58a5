"""Traces and metrics by OpenTelemetry's conventions for generative AI, sent as OTLP over HTTP.

Needs the extra `otel`; only imported where `otlp_endpoint` is set. Spans are made when a request
has ended, from what was recorded of it, so that nothing is done for them while tokens come.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers

from app.telemetry.accounts import Account
from app.telemetry.timings import Phases

_PROVIDER = "slipstream"
_EXPORT_SECONDS = 5.0  # what a collector that does not answer may delay the server's end by, twice
_OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/embeddings": "embeddings",
    "/classify": "classify",
    **dict.fromkeys(("/score", "/v1/score"), "score"),
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), "rerank"),
}
# The bucket edges that the conventions recommend, in seconds.
_DURATION = [0.01 * 2**i for i in range(14)]
_FIRST = [
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
]
_PER_TOKEN = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5]


class Tracing:
    """`ended` is told of every request; `close` sends what is left."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` is the collector's base address."""
        base, resource = endpoint.rstrip("/"), _resource()
        spans = OTLPSpanExporter(f"{base}/v1/traces", timeout=_EXPORT_SECONDS)
        self._traces = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._traces.add_span_processor(BatchSpanProcessor(spans))
        self._tracer = self._traces.get_tracer(_PROVIDER)
        metrics = OTLPMetricExporter(f"{base}/v1/metrics", timeout=_EXPORT_SECONDS)
        reader = PeriodicExportingMetricReader(metrics)
        self._metrics = MeterProvider([reader], resource, shutdown_on_exit=False)
        meter = self._metrics.get_meter(_PROVIDER)

        def histogram(name: str, edges: list[float]) -> Any:
            return meter.create_histogram(name, "s", explicit_bucket_boundaries_advisory=edges)

        self._duration = histogram("gen_ai.server.request.duration", _DURATION)
        self._first = histogram("gen_ai.server.time_to_first_token", _FIRST)
        self._per_token = histogram("gen_ai.server.time_per_output_token", _PER_TOKEN)
        self._propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Blocks until all is sent, or cannot be."""
        self._traces.shutdown()
        self._metrics.shutdown()

    def ended(self, account: Account) -> None:
        """A request has ended: its span, those of its phases, and its share of the metrics."""
        operation = _OPERATIONS.get(account.scope["path"])
        if operation is None or account.scope["method"] != "POST":
            return
        common = _common(account, operation)
        self._trace(account, operation, common)
        self._measure(account, common)

    def _trace(self, account: Account, operation: str, common: Mapping[str, Any]) -> None:
        clock = time.time_ns() - time.monotonic_ns()  # from the latter to the former

        def at(seconds: float) -> int:
            return int(seconds * 1e9) + clock

        headers = Headers(scope=account.scope)
        carrier = {n: headers[n] for n in ("traceparent", "tracestate") if n in headers}
        span = self._tracer.start_span(
            " ".join(filter(None, (operation, account.model))),
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={**common, **_request(account), **_answer(account)},
            start_time=at(account.began),
        )
        if "error.type" in common:
            span.set_status(Status(StatusCode.ERROR))
        for name, began, ended in _phases(account):
            self._phase(span, name, at(began), at(ended))
        span.end(at(account.ended))

    def _phase(self, parent: Span, name: str, began: int, ended: int) -> None:
        context = trace.set_span_in_context(parent)
        self._tracer.start_span(name, context=context, start_time=began).end(ended)

    def _measure(self, account: Account, common: Mapping[str, Any]) -> None:
        attributes = {k: v for k, v in common.items() if k.startswith(("gen_ai", "error"))}
        self._duration.record(account.ended - account.began, attributes)
        if account.flight is None or "error.type" in common:
            return
        for lane in account.flight.lanes:
            if lane.first:
                self._first.record(lane.first - lane.arrival, attributes)
            if lane.tokens > 1:
                seconds = (lane.last - lane.first) / (lane.tokens - 1)
                self._per_token.record(seconds, attributes)


def _resource() -> Resource:
    """With a name, unless the environment gives one (OTEL_SERVICE_NAME)."""
    found = Resource.create()
    if str(found.attributes[SERVICE_NAME]).startswith("unknown_service"):
        found = found.merge(Resource({SERVICE_NAME: _PROVIDER}))
    return found


def _common(account: Account, operation: str) -> dict[str, Any]:
    """What both spans and metrics say."""
    common: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _PROVIDER,
    }
    if account.model is not None:
        common |= {"gen_ai.request.model": account.model, "gen_ai.response.model": account.model}
    if account.error is not None:
        common["error.type"] = account.error
    elif account.status >= 400 or account.finish == "error":
        common["error.type"] = str(account.status) if account.status >= 400 else "engine_error"
    return common


def _request(account: Account) -> dict[str, Any]:
    state, flight = account.scope["state"], account.flight
    attributes: dict[str, Any] = {
        "http.request.method": account.scope["method"],
        "http.response.status_code": account.status,
        "url.path": account.scope["path"],
        "slipstream.request.id": state["request_id"],
    }
    if (params := state.get("params")) is not None and flight is not None:
        attributes |= {
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.seed": params.seed,
            "gen_ai.request.frequency_penalty": params.frequency_penalty,
            "gen_ai.request.presence_penalty": params.presence_penalty,
            "gen_ai.request.stream": flight.streamed,
        }
        if len(flight.lanes) > 1:
            attributes["gen_ai.request.choice.count"] = len(flight.lanes)
    return attributes


def _answer(account: Account) -> dict[str, Any]:
    if account.pooled is not None:
        return {"gen_ai.usage.input_tokens": account.pooled.tokens}
    flight = account.flight
    if flight is None or flight.usage is None:
        return {}
    usage = flight.usage
    attributes: dict[str, Any] = {
        "gen_ai.response.id": flight.answer_id,
        "gen_ai.response.finish_reasons": [lane.finish or "" for lane in flight.lanes],
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.prompt_tokens_details.cached_tokens,
    }
    if usage.completion_tokens_details:
        reasoning = usage.completion_tokens_details.reasoning_tokens
        attributes["gen_ai.usage.reasoning.output_tokens"] = reasoning
    first = Phases.of(flight.lanes).first
    if flight.streamed and first:
        attributes["gen_ai.response.time_to_first_chunk"] = first - account.began
    return attributes


def _phases(account: Account) -> list[tuple[str, float, float]]:
    """(name, began, ended), of those that have ended."""
    if (pooled := account.pooled) is not None:
        return [
            ("queue", pooled.arrival, pooled.scheduled),
            ("compute", pooled.scheduled, pooled.finished),
        ]
    if account.flight is None:
        return []
    times = Phases.of(account.flight.lanes)
    found = (
        ("queue", times.arrival, times.scheduled),
        ("prefill", times.scheduled, times.first),
        ("decode", times.first, times.last),
    )
    return [phase for phase in found if phase[1] and phase[2]]
