"""Traces and metrics of a real server, received as a collector does; and what is logged."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from app.server import MissingExtraError, load_tracing
from tests.e2e.server_process import ServerProcess

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes in OTLP over HTTP, and remembers all of it."""

    def __init__(self) -> None:
        received: list[tuple[str, bytes]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                received.append((self.path, body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.received = received
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self) -> list[Span]:
        bodies = [body for path, body in self.received if path == "/v1/traces"]
        requests = [ExportTraceServiceRequest.FromString(body) for body in bodies]
        resources = [resource for request in requests for resource in request.resource_spans]
        names = [values(r.resource.attributes)["service.name"] for r in resources]
        assert set(names) == {"slipstream"}
        return [s for r in resources for scope in r.scope_spans for s in scope.spans]

    def histograms(self) -> dict[str, Any]:
        """The last that was said of each, by name."""
        bodies = [body for path, body in self.received if path == "/v1/metrics"]
        return {
            metric.name: metric.histogram.data_points
            for body in bodies
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


def values(attributes: Any) -> dict[str, Any]:
    found = {}
    for attribute in attributes:
        kind = attribute.value.WhichOneof("value")
        value = getattr(attribute.value, kind)
        if kind == "array_value":
            value = [v.string_value for v in value.values]
        found[attribute.key] = value
    return found


class Told(dict[str, Any]):
    """What was sent and what came of it: `collector`, `log`, and answers by name."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    collector = Collector()
    server = ServerProcess(
        tmp_path_factory.mktemp("traced") / "log",
        *("--worker", "simulated", "--served-model-name", "m"),
        *("--otlp-endpoint", collector.url + "/", "--log-format", "json"),
    )
    try:
        server.wait_ready()
        answers = _ask(server)
        assert server.stop() == 0
        yield Told(answers, collector=collector, log=server.log())
    finally:
        server.process.kill()
        server.process.wait()
        collector.close()


def _ask(server: ServerProcess) -> dict[str, Any]:
    chat = {"messages": [{"role": "user", "content": "a secret"}]}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "first"}
        answer = client.post(
            "/v1/chat/completions",
            json=chat | {"max_tokens": 8, "temperature": 0.5, "seed": 7},
            headers=headers,
        )
        sampled_out = {"traceparent": f"00-{TRACE}-{PARENT}-00", "x-request-id": "unsampled"}
        client.post("/v1/completions", json={"prompt": "a"}, headers=sampled_out)
        streamed = {"prompt": "a", "n": 2, "max_tokens": 3, "stream": True}
        client.post("/v1/completions", json=streamed, headers={"x-request-id": "streamed"})
        client.post("/v1/messages", json={"nonsense": 1}, headers={"x-request-id": "refused"})
    return {"answer": answer.json()}


def find(spans: list[Span], request: str) -> tuple[Span, dict[str, Any], list[Span]]:
    """A request's span, its attributes, and the spans below it in order."""
    (span,) = [s for s in spans if values(s.attributes).get("slipstream.request.id") == request]
    below = [s for s in spans if s.parent_span_id == span.span_id]
    return span, values(span.attributes), sorted(below, key=lambda s: s.start_time_unix_nano)


def test_a_span_says_what_the_conventions_ask_for(told: Told) -> None:
    span, attributes, _ = find(told["collector"].spans(), "first")
    usage = told["answer"]["usage"]
    assert (span.name, span.kind) == ("chat m", Span.SPAN_KIND_SERVER)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "slipstream",
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stream": False,
        "gen_ai.response.model": "m",
        "gen_ai.response.id": told["answer"]["id"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
    }
    assert expected.items() <= attributes.items()
    assert span.status.code != Status.STATUS_CODE_ERROR


def test_it_belongs_to_the_callers_trace(told: Told) -> None:
    spans = told["collector"].spans()
    span, _, below = find(spans, "first")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert {s.trace_id.hex() for s in below} == {TRACE}
    others = [s for s in spans if s.trace_id.hex() != TRACE]
    assert find(others, "streamed")[0].parent_span_id == b""
    assert not any("unsampled" in values(s.attributes).values() for s in spans), (
        "the caller decides"
    )


@pytest.mark.parametrize("request_id", ["first", "streamed"])
def test_its_phases_lie_within_it_one_after_the_other(told: Told, request_id: str) -> None:
    span, attributes, phases = find(told["collector"].spans(), request_id)
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    times = [span.start_time_unix_nano]
    times += [t for p in phases for t in (p.start_time_unix_nano, p.end_time_unix_nano)]
    times.append(span.end_time_unix_nano)
    assert times == sorted(times)
    assert phases[0].end_time_unix_nano == phases[1].start_time_unix_nano
    if request_id == "streamed":
        assert attributes["gen_ai.operation.name"] == "text_completion"
        assert attributes["gen_ai.request.choice.count"] == 2
        assert attributes["gen_ai.response.time_to_first_chunk"] > 0


def test_a_refusal_is_an_error(told: Told) -> None:
    span, attributes, phases = find(told["collector"].spans(), "refused")
    assert (span.name, span.status.code) == ("chat", Status.STATUS_CODE_ERROR)
    assert attributes["error.type"] == "unknown_parameter"
    assert attributes["http.response.status_code"] == 400
    assert phases == []


def test_metrics_count_what_was_served(told: Told) -> None:
    found = told["collector"].histograms()
    durations = {values(p.attributes)["gen_ai.operation.name"]: p for p in found["gen_ai.server.request.duration"] if "error.type" not in values(p.attributes)}  # fmt: skip  # noqa: E501
    assert {name: point.count for name, point in durations.items()} == {
        "chat": 1,
        "text_completion": 2,
    }
    assert list(durations["chat"].explicit_bounds)[:3] == [0.01, 0.02, 0.04]
    assert sum(p.count for p in found["gen_ai.server.time_to_first_token"]) == 4
    assert sum(p.count for p in found["gen_ai.server.time_per_output_token"]) == 4
    failed = [p for p in found["gen_ai.server.request.duration"] if "error.type" in values(p.attributes)]  # fmt: skip  # noqa: E501
    assert [p.count for p in failed] == [1]


def test_nothing_that_was_said_is_told(told: Told) -> None:
    assert "secret" not in told["log"]
    assert not any(b"secret" in body for _, body in told["collector"].received)


def test_every_line_of_the_log_is_an_object(told: Told) -> None:
    lines = [json.loads(line) for line in told["log"].splitlines()]
    assert {"time", "level", "message"} <= set.intersection(*map(set, lines))
    requests = {line["request_id"]: line for line in lines if line["message"] == "request"}
    first = requests["first"]
    assert first["completion_tokens"] == told["answer"]["usage"]["completion_tokens"]
    assert (first["model"], first["finish"], first["status"]) == ("m", "length", 200)
    assert requests["refused"]["error"] == "unknown_parameter"
    assert any(line["message"].startswith("ready") for line in lines)


def test_without_an_endpoint_nothing_of_it_is_imported() -> None:
    code = (
        "import sys, app.server, app.application;"
        "unwanted = ('opentelemetry.sdk', 'app.telemetry.tracing');"
        "print([m for m in sys.modules if m.startswith(unwanted)])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_without_the_extra_the_server_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "app.telemetry.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'slipstream\[otel\]'"):
        load_tracing("http://127.0.0.1:1")
