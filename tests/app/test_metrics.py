"""Metrics under vLLM's names; counters advance exactly by usage."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from app.flights.recorder import FlightRecorder
from app.telemetry.histogram import (
    INTER_TOKEN_EDGES,
    REQUEST_EDGES,
    TTFT_EDGES,
    Histogram,
    length_edges,
)
from app.telemetry.metrics import Metrics, exported_names
from batching.core.types import (
    EngineStats,
    FinishReason,
    Request,
    SamplingParams,
    StepSummary,
    TokenEvent,
)
from batching.engine.messages import StepOutput
from tests.app.conftest import MakeServer, Server
from tests.app.test_keys import bearer, complete, write

VLLM_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20),
    *(40, 80, 160, 640, 2560),
)
VLLM_ITL = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40),
    80,
)
VLLM_REQUEST = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920),
    7680,
)


async def scrape(server: Server) -> dict[str, float]:
    """Sample name (with its extra label's value in brackets) to value."""
    response = await server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {}
    for family in text_string_to_metric_families(response.text):
        if family.name.startswith("process_") or family.name == "slipstream_event_loop_tasks":
            continue  # of no model
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny"
            assert sample.labels["engine"] == "0"
            extra = [v for k, v in sample.labels.items() if k not in ("model_name", "engine")]
            samples[sample.name + (f"[{','.join(extra)}]" if extra else "")] = sample.value
    return samples


async def test_counters_advance_exactly_by_usage(server: Server) -> None:
    expected = {"prompt_tokens": 0, "completion_tokens": 0}
    fields: list[dict[str, Any]] = [
        {"prompt": ["hello", "world"], "n": 3, "seed": 1},
        {"prompt": "hello", "best_of": 3, "seed": 1},
        {"prompt": "hello", "echo": True, "max_tokens": 0},
        {"prompt": "hello", "stop": ["e", "a", "o"], "max_tokens": 100},
    ]
    for body in fields:
        usage = (await server.ok("/v1/completions", **body))["usage"]
        for name in expected:
            expected[name] += usage[name]
    chunks = await server.events(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=20,
        stream_options={"include_usage": True},
    )
    for name in expected:
        expected[name] += chunks[-1]["usage"][name]
    samples = await scrape(server)
    assert samples["vllm:prompt_tokens_total"] == expected["prompt_tokens"]
    assert samples["vllm:generation_tokens_total"] == expected["completion_tokens"]
    assert samples["vllm:request_generation_tokens_sum"] == expected["completion_tokens"]
    ended = sum(v for k, v in samples.items() if k.startswith("vllm:request_success_total"))
    assert ended == samples["vllm:request_generation_tokens_count"] == 12
    assert samples["vllm:time_to_first_token_seconds_count"] == 12
    assert samples["vllm:request_params_n_count"] == 5
    # Of a prompt's samples the longest counts; there are 6 prompts.
    assert samples["vllm:request_max_num_generation_tokens_count"] == 6
    longest = samples["vllm:request_max_num_generation_tokens_sum"]
    assert expected["completion_tokens"] / 3 <= longest < expected["completion_tokens"]


async def test_gauges_come_from_the_engines_statistics(server: Server) -> None:
    server.engine.stats = EngineStats(
        running=3, waiting=2, blocks_total=8, blocks_used=2, preemptions=4, prefix_queries=9,
        prefix_hits=5,
    )  # fmt: skip
    samples = await scrape(server)
    assert samples["vllm:num_requests_running"] == 3
    assert samples["vllm:num_requests_waiting"] == 2
    assert samples["vllm:num_requests_waiting_by_reason[capacity]"] == 2
    assert samples["vllm:kv_cache_usage_perc"] == 0.25
    assert samples["vllm:num_preemptions_total"] == 4
    assert samples["vllm:prefix_cache_queries_total"] == 9
    assert samples["vllm:prefix_cache_hits_total"] == 5
    assert samples["vllm:cache_config_info[16,float32,64]"] == 1


def test_times_of_one_request() -> None:
    metrics = Metrics("m")
    flights = FlightRecorder(metrics)
    state = {"request_id": "x", "arrival": 0.75}
    flight = flights.board({"state": state, "path": "/"}, "answer", streamed=True)
    request = Request("a-0", [1, 2], SamplingParams(3), arrival=1.0)
    flights.depart(flight, request)
    flights.submitted(flight, request)
    for now, tokens, chunks in (
        (2.0, (5,), (("a-0", 0, 2),)), (2.5, (6,), ()), (2.75, (7,), ()),
    ):  # fmt: skip
        finish = FinishReason.LENGTH if tokens == (7,) else None
        event = TokenEvent("a-0", tokens=tokens, finish=finish)
        step = StepSummary(began=now - 0.5, ended=now, sequences=1, chunks=chunks)
        output = StepOutput([event], EngineStats(step_tokens=4), step)
        metrics.on_step(output)
        flights.on_step(output)
    flights.lane_ended("a-0", "length", 3)
    samples = {s.name: s.value for f in metrics.collect() for s in f.samples if not s.name.endswith("_bucket")}  # fmt: skip  # noqa: E501
    sums = {
        "time_to_first_token_seconds": (1.25, 1),
        "inter_token_latency_seconds": (0.75, 2),
        "request_time_per_output_token_seconds": (0.375, 1),
        "e2e_request_latency_seconds": (2.0, 1),
        "request_queue_time_seconds": (0.5, 1),
        "request_prefill_time_seconds": (0.5, 1),
        "request_decode_time_seconds": (0.75, 1),
        "request_inference_time_seconds": (1.25, 1),
        "iteration_tokens_total": (12, 3),
        "request_params_max_tokens": (3, 1),
    }
    for name, (total, count) in sums.items():
        assert (samples[f"vllm:{name}_sum"], samples[f"vllm:{name}_count"]) == (total, count), name


async def test_nothing_is_remembered_of_requests_that_ended(server: Server) -> None:
    for stop in (None, ["a"]):
        await server.ok("/v1/completions", prompt="a", n=3, max_tokens=50, stop=stop)
    flights = server.service.flights
    assert not (flights.open or flights._lanes or flights._waiting)


def test_steps_that_took_other_than_forecast() -> None:
    metrics = Metrics("m")
    for forecast in (0.0, 0.4, 0.52, 0.6):
        stats = EngineStats(step_seconds=0.5, predicted_step_seconds=forecast)
        metrics.on_step(StepOutput([], stats, StepSummary(began=1.0, ended=1.5, sequences=1)))
        metrics.on_step(StepOutput([], stats))  # an idle second: no other step
    found = {
        (s.name.removeprefix("slipstream_step_time_error_seconds"), s.labels["side"]): s.value
        for family in metrics.collect()
        for s in family.samples
        if s.name.startswith("slipstream_step_time_error_seconds")
    }
    assert found["_count", "late"] == 1
    assert found["_sum", "late"] == pytest.approx(0.1)
    assert found["_count", "early"] == 2
    assert found["_sum", "early"] == pytest.approx(0.12)


def test_what_steps_were_made_of() -> None:
    metrics = Metrics("m")
    chunks = (("a", 0, 100), ("b", 64, 28))
    for step in (
        StepSummary(began=0.0, ended=0.1, sequences=5, chunks=chunks),
        StepSummary(began=0.1, ended=0.2, sequences=5),
    ):
        metrics.on_step(StepOutput([], EngineStats(), step))
    found = {
        (s.name, s.labels["kind"]): s.value
        for family in metrics.collect()
        for s in family.samples
        if "kind" in s.labels and "le" not in s.labels
    }
    name = "slipstream_batch_sequences"
    assert (found[f"{name}_sum", "prefill"], found[f"{name}_count", "prefill"]) == (2, 2)
    assert (found[f"{name}_sum", "decode"], found[f"{name}_count", "decode"]) == (3 + 5, 2)
    assert found["slipstream_batch_tokens_total", "prefill"] == 128
    assert found["slipstream_batch_tokens_total", "decode"] == 8


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        (EngineStats(blocks_total=64), 0.0),
        (EngineStats(running=2, blocks_total=64, blocks_used=8), 0.25),  # of 8 slots
        (EngineStats(running=8, waiting=4, blocks_total=64, blocks_used=8), 1.5),
        (EngineStats(running=2, waiting=1, blocks_total=64, blocks_used=64), 1.5),  # of blocks
        (EngineStats(waiting=2), 0.25),
    ],
)
async def test_the_load_is_demand_by_the_scarcest_capacity(
    server: Server, stats: EngineStats, expected: float
) -> None:
    server.engine.stats = stats
    assert (await scrape(server))["slipstream_load_ratio"] == pytest.approx(expected)


def test_edges_are_vllms_and_finer() -> None:
    assert set(VLLM_TTFT) < set(TTFT_EDGES)
    assert set(VLLM_ITL) < set(INTER_TOKEN_EDGES)
    assert set(VLLM_REQUEST) < set(REQUEST_EDGES)
    for edges in (TTFT_EDGES, INTER_TOKEN_EDGES, REQUEST_EDGES):
        assert list(edges) == sorted(set(edges))
    assert length_edges(60) == (1, 2, 5, 10, 20, 50)


@given(st.lists(st.floats(0, 100)))
def test_histogram_counts(values: list[float]) -> None:
    edges = (0.5, 1.0, 10.0)
    histogram = Histogram("h", "", edges)
    for value in values:
        histogram.observe(value)
    samples = histogram.family({"a": "b"}).samples
    buckets = [s.value for s in samples if s.name == "h_bucket"]
    assert buckets == [sum(v <= e for v in values) for e in (*edges, float("inf"))]
    assert bisect_left(edges, 1.0) == 1  # an edge belongs to its own bucket


def test_exported_names_are_what_dashboards_ask_for() -> None:
    names = exported_names()
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
        "cache_config_info", "prompt_tokens_total", "generation_tokens_total",
        "request_success_total", "admission_rejections_total", "num_preemptions_total",
        "prefix_cache_queries_total", "prefix_cache_hits_total",
        "num_requests_waiting_by_reason", "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket", "request_time_per_output_token_seconds_sum",
        "e2e_request_latency_seconds_count", "request_queue_time_seconds_sum",
        "request_prefill_time_seconds_sum", "request_decode_time_seconds_sum",
        "request_inference_time_seconds_sum", "iteration_tokens_total_bucket",
        "request_prompt_tokens_bucket", "request_generation_tokens_bucket",
        "request_max_num_generation_tokens_sum",
    ):  # fmt: skip
        assert f"vllm:{name}" in names


async def test_full_queue(make_server: MakeServer) -> None:
    import asyncio

    server = make_server(max_queued_requests=2, max_queued_tokens=8)
    server.engine.stats = EngineStats(prompt_tokens=10, forward_seconds=20.0)
    server.engine.resume.clear()
    waiting = [asyncio.create_task(server.post("/v1/completions", prompt=[70] * 3))]
    await asyncio.sleep(0.01)
    refused = await server.post("/v1/completions", prompt=[70] * 6, stream=True)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "max_num_queued_tokens"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    message = refused.json()["error"]["message"]
    assert "at most 8 prompt tokens" in message, "the limit and its value"
    assert "1 requests with 3 prompt tokens wait now" in message, "the present load"
    assert refused.headers["retry-after"] == "6"  # 3 queued tokens at half a token per second
    waiting.append(asyncio.create_task(server.post("/v1/completions", prompt=[70])))
    await asyncio.sleep(0.01)
    refused = await server.post("/v1/completions", prompt=[70])
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "max_num_queued_reqs"
    server.engine.resume.set()
    assert [r.status_code for r in await asyncio.gather(*waiting)] == [200, 200]
    assert (await server.post("/v1/completions", prompt=[70] * 100)).status_code == 200
    samples = await scrape(server)
    assert samples["vllm:admission_rejections_total[max_num_queued_tokens]"] == 1
    assert samples["vllm:admission_rejections_total[max_num_queued_reqs]"] == 1


async def test_what_quotas_refuse_is_counted(make_server: MakeServer, tmp_path: Path) -> None:
    path = write(tmp_path / "keys", once={"requests_per_minute": 1}, few={"tokens_per_minute": 9})
    server = make_server(api_key_file=str(path))
    for secret, prompt, status in (
        ("once", 3, 200),
        ("once", 3, 429),  # before a byte of it is read
        ("few", 1, 200),
        ("few", 9, 429),  # its prompt is too long
    ):
        assert (await complete(server, secret, prompt=[70] * prompt)).status_code == status
    server.http.headers.update(bearer("once"))
    samples = await scrape(server)
    assert samples["vllm:admission_rejections_total[rate_limit_exceeded]"] == 2
