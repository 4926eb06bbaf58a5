"""The metrics of a real server: what dashboards made for vLLM ask for is there, and counts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.server_process import ServerProcess

# Of vLLM's published Grafana dashboard: each panel's series, and how it asks for them.
_MODEL = '{model_name="$model_name"}'
_RATE = f"{_MODEL}[$__rate_interval]"


def _latency(name: str) -> list[str]:
    quantiles = [
        f"histogram_quantile({q}, sum by(le) (rate(vllm:{name}_bucket{_RATE})))"
        for q in (0.5, 0.9, 0.95, 0.99)
    ]
    return [*quantiles, f"rate(vllm:{name}_sum{_RATE}) / rate(vllm:{name}_count{_RATE})"]


VLLM_DASHBOARD = [
    *_latency("e2e_request_latency_seconds"),
    *_latency("inter_token_latency_seconds"),
    *_latency("time_to_first_token_seconds"),
    f"rate(vllm:prompt_tokens_total{_RATE})",
    f"rate(vllm:generation_tokens_total{_RATE})",
    f"vllm:num_requests_running{_MODEL}",
    f"vllm:num_requests_waiting{_MODEL}",
    f"vllm:kv_cache_usage_perc{_MODEL}",
    f"sum by(le) (increase(vllm:request_prompt_tokens_bucket{_RATE}))",
    f"sum by(le) (increase(vllm:request_generation_tokens_bucket{_RATE}))",
    f"sum by(finished_reason) (increase(vllm:request_success_total{_RATE}))",
    f"rate(vllm:request_queue_time_seconds_sum{_RATE})",
    f"rate(vllm:request_prefill_time_seconds_sum{_RATE})",
    f"rate(vllm:request_decode_time_seconds_sum{_RATE})",
    f"rate(vllm:request_max_num_generation_tokens_sum{_RATE})",
]
# Gauges, counters and histograms that gateways, autoscalers and recording rules know.
VLLM_TYPES = {
    "gauge": {
        "num_requests_running": [], "num_requests_waiting": [], "kv_cache_usage_perc": [],
        "num_requests_waiting_by_reason": ["reason"],
        "cache_config_info": ["block_size", "num_gpu_blocks"],
    },
    "counter": {
        "prefix_cache_queries": [], "prefix_cache_hits": [], "num_preemptions": [],
        "prompt_tokens": [], "generation_tokens": [], "request_success": ["finished_reason"],
        "admission_rejections": ["reason"],
    },
    "histogram": {
        "time_to_first_token_seconds": [], "inter_token_latency_seconds": [],
        "request_time_per_output_token_seconds": [], "e2e_request_latency_seconds": [],
        "request_queue_time_seconds": [], "request_prefill_time_seconds": [],
        "request_decode_time_seconds": [], "request_inference_time_seconds": [],
        "iteration_tokens_total": [], "request_prompt_tokens": [],
        "request_generation_tokens": [], "request_max_num_generation_tokens": [],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def families(server: ServerProcess) -> dict[str, Metric]:
    """What one request left behind, by name."""
    complete(server, prompt="Once upon", max_tokens=4)
    text = httpx.get(f"{server.url}/metrics").text
    return {family.name: family for family in text_string_to_metric_families(text)}


@pytest.mark.parametrize("query", VLLM_DASHBOARD)
def test_vllms_dashboard_finds_what_it_asks_for(query: str, families: dict[str, Metric]) -> None:
    samples = [sample for family in families.values() for sample in family.samples]
    grouped = set(re.findall(r"by\((\w+)\)", query))
    names = re.findall(r"(vllm:\w+){(\w+)=", query)
    assert names
    for name, label in names:
        found = [s for s in samples if s.name == name]
        assert found, name
        assert all({label, *grouped} <= set(s.labels) for s in found)


@pytest.mark.parametrize("kind", VLLM_TYPES)
def test_types_and_labels_are_vllms(kind: str, families: dict[str, Metric]) -> None:
    for name, labels in VLLM_TYPES[kind].items():
        family = families[f"vllm:{name}"]
        assert family.type == kind, name
        for sample in family.samples:
            assert {"model_name", "engine", *labels} <= set(sample.labels), name


def test_of_our_own(families: dict[str, Metric], server: ServerProcess) -> None:
    phases = {s.labels["phase"]: s.value for s in families["slipstream_startup_seconds"].samples}
    assert {"weights", "kv"} <= set(phases)
    assert all(seconds >= 0 for seconds in phases.values())
    for name in ("scheduler_stage", "forward", "idle"):
        assert server.metric(f"slipstream_{name}_seconds_total") > 0, name
    stages = families["slipstream_scheduler_stage_seconds"].samples
    assert {s.labels["stage"] for s in stages} == {
        "inbox", "plan", "submit", "wait", "commit", "outbox"
    }  # fmt: skip
    assert 0 <= server.metric("slipstream_load_ratio") <= 1
    steps = server.metric("vllm:iteration_tokens_total_count")
    assert 0 < server.metric("slipstream_step_time_error_seconds_count") <= steps


def test_a_forecast_is_made_and_compared_with_what_came(server: ServerProcess) -> None:
    complete(server, prompt="Once upon", max_tokens=16)  # the engine must have measured steps
    name = "slipstream_predicted_ttft_error_seconds_count"
    server.wait_idle()
    before = server.metric(name)
    body = {"prompt": "Once upon a time", "max_tokens": 2}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.headers["x-queue-position"] == "0"
    assert float(answer.headers["x-predicted-ttft-ms"]) > 0
    assert server.metric(name) == before + 1


# -- counters and usage --------------------------------------------------------------------------

TOKENS = {
    "prompt_tokens": "vllm:prompt_tokens_total",
    "completion_tokens": "vllm:generation_tokens_total",
}


def complete(server: ServerProcess, **fields: Any) -> dict[str, int]:
    """The usage of a completion."""
    answer = httpx.post(f"{server.url}/v1/completions", json=fields, timeout=60)
    assert answer.status_code == 200, answer.text
    usage: dict[str, int] = answer.json()["usage"]
    return usage


def streamed(server: ServerProcess, chunks: int, **fields: Any) -> dict[str, int]:
    """The usage that the last of so many chunks of a stream tells; then the client goes away."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = fields | {"stream": True, "stream_options": options}
    usage: dict[str, int] = {}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        for chunk in _chunks(answer):
            usage = chunk["usage"]
            if (chunks := chunks - 1) == 0:
                break
    return usage


def _chunks(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Once upon a time"},
        {"prompt": ["Once upon a time", "There was", "A"], "max_tokens": 9},
        {"prompt": ["Once", "There was a dog"], "n": 3, "max_tokens": 8, "seed": 3},
        {"prompt": "Once", "best_of": 4, "n": 2, "max_tokens": 6, "seed": 3},
        {"prompt": "Once upon a time", "stop": [" ", "a"], "max_tokens": 64, "n": 2, "seed": 1},
        {"prompt": "Once upon a time", "echo": True, "max_tokens": 0},
    ],
)
def test_counters_advance_by_exactly_the_usage(
    server: ServerProcess, fields: dict[str, Any]
) -> None:
    server.wait_idle()
    before = {name: server.metric(series) for name, series in TOKENS.items()}
    usage = complete(server, **fields)
    after = {name: server.metric(series) for name, series in TOKENS.items()}
    assert {name: after[name] - before[name] for name in TOKENS} == {
        name: usage[name] for name in TOKENS
    }


def test_a_stream_that_is_left_counts_what_came_of_it(server: ServerProcess) -> None:
    server.wait_idle()
    before = {name: server.metric(series) for name, series in TOKENS.items()}
    aborted = server.metric("vllm:request_success_total")
    usage = streamed(server, 5, prompt="Once upon a time", max_tokens=400, n=2, seed=1)
    server.wait_idle()
    after = {name: server.metric(series) for name, series in TOKENS.items()}
    assert server.metric("vllm:request_success_total") - aborted == 2
    assert after["prompt_tokens"] - before["prompt_tokens"] == usage["prompt_tokens"]
    # What the server had decoded before it heard of it is counted, too.
    assert usage["completion_tokens"] <= after["completion_tokens"] - before["completion_tokens"]
    assert after["completion_tokens"] - before["completion_tokens"] < 800
