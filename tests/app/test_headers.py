"""What responses tell of forecasts and of the server's load."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from batching.core.types import EngineStats
from tests.app.conftest import Server
from tests.app.test_deadlines import BUSY, OUTLOOK
from tests.app.test_metrics import scrape

LOADED = EngineStats(running=2, waiting=3, blocks_total=8, blocks_used=2)
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
BODIES = {
    "/v1/completions": {"prompt": [70] * 100, "max_tokens": 3},
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT,
    "/v1/responses": {"input": "hi"},
}


async def ask(
    server: Server, headers: dict[str, str], path: str = "/v1/completions", **fields: Any
) -> httpx.Response:
    return await server.http.post(path, json=BODIES[path] | fields, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_forecast_and_the_place_in_the_queue(server: Server, stream: bool) -> None:
    server.engine.stats = BUSY
    server.engine.resume.clear()
    first = asyncio.create_task(ask(server, {}, n=2, stream=stream))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(ask(server, {}, stream=stream))
    await asyncio.sleep(0.01)
    server.engine.resume.set()
    answers = [(await task).headers for task in (first, second)]
    assert [answer["x-queue-position"] for answer in answers] == ["0", "2"]
    # 100 tokens, 12 steps, half of this one; then those of the first as well.
    forecasts = [float(answer["x-predicted-ttft-ms"]) for answer in answers]
    assert forecasts[0] == pytest.approx(11205.0)
    assert forecasts[1] > 3 * 11_000
    samples = await scrape(server)
    name = "slipstream_predicted_ttft_error_seconds"
    assert sum(samples[f"{name}_count[{side}]"] for side in ("early", "late")) == 2
    assert samples[f"{name}_sum[early]"] > 0.1, "the fake engine takes no time"


async def test_no_forecast_is_made_up(server: Server) -> None:
    answer = await ask(server, {})
    assert answer.headers["x-queue-position"] == "0"
    assert "x-predicted-ttft-ms" not in answer.headers
    assert (await scrape(server))["slipstream_predicted_ttft_error_seconds_count[late]"] == 0


async def test_a_refusal_has_its_forecast(server: Server) -> None:
    server.engine.stats = BUSY
    refused = await ask(server, {"x-slo-ttft-ms": "9000"})
    assert refused.status_code == 429
    assert float(refused.headers["x-predicted-ttft-ms"]) == pytest.approx(11205.0)


async def test_who_waits_is_load(server: Server) -> None:
    server.engine.stats = EngineStats(outlook=OUTLOOK)
    server.engine.resume.clear()
    waiting = asyncio.create_task(ask(server, {}, prompt=[70] * 250, max_tokens=1))
    await asyncio.sleep(0.01)
    samples = await scrape(server)
    wait = samples["slipstream_predicted_wait_seconds"]
    assert wait > 25, "the prompt takes that"
    assert samples["slipstream_load_ratio"] == pytest.approx(wait / 2.0)
    server.engine.resume.set()
    assert (await waiting).status_code == 200
    assert (await scrape(server))["slipstream_predicted_wait_seconds"] == 0.0


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wanted", ["TEXT", "json"])
async def test_the_load_is_reported_as_asked(
    server: Server, path: str, stream: bool, wanted: str
) -> None:
    server.engine.stats = LOADED
    answer = await ask(server, {"endpoint-load-metrics-format": wanted}, path, stream=stream)
    assert answer.status_code == 200, answer.text
    report = answer.headers["endpoint-load-metrics"]
    if wanted == "TEXT":
        expected = "named_metrics.kv_cache_usage_perc=0.25, named_metrics.num_requests_waiting=3.0"
        assert report == f"TEXT {expected}"
    else:
        values = {"kv_cache_usage_perc": 0.25, "num_requests_waiting": 3.0}
        assert report.startswith("JSON ")
        assert json.loads(report.removeprefix("JSON ")) == {"named_metrics": values}


async def test_the_load_is_not_reported_unasked(server: Server) -> None:
    assert "endpoint-load-metrics" not in (await ask(server, {})).headers


@pytest.mark.parametrize("wanted", ["", "BIN", "TEXT, JSON"])
async def test_another_format_is_refused(server: Server, wanted: str) -> None:
    answer = await ask(server, {"endpoint-load-metrics-format": wanted})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "endpoint-load-metrics-format"
    assert "TEXT or JSON" in error["message"]
    assert not server.engine.requests
