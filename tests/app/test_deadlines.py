"""`Request-Timeout-Ms` and `x-slo-ttft-ms`: refused at once, dropped unserved, or ended."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from batching.core.types import Coefficients, EngineStats, Outlook
from tests.app.conftest import MakeServer, Server, parse_events
from tests.app.pooling import MakePools, make_pools, pool_folder
from tests.app.test_disconnect import until
from tests.app.test_metrics import scrape

__all__ = ["make_pools", "pool_folder"]

# A tenth of a second a token, a step of ten tokens or one without takes 0.1 s longer.
OUTLOOK = Outlook(
    cost=Coefficients(0.1, 0.1, 0.0, 0.0, 0.0), decode_seconds=0.1, prefill_seconds=0.85,
    prefilling=0, prefilled_tokens=0, output_tokens=100.0, blocked=False,
)  # fmt: skip
BUSY = EngineStats(running=1, step_seconds=0.01, outlook=OUTLOOK)


async def ask(server: Server, headers: dict[str, str], **fields: Any) -> httpx.Response:
    fields = {"prompt": [70] * 100, "max_tokens": 3} | fields
    return await server.http.post("/v1/completions", json=fields, headers=headers)


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == code
    return error


async def misses(server: Server) -> dict[str, float]:
    samples = await scrape(server)
    name = "slipstream_deadline_misses_total"
    return {r: samples[f"{name}[{r}]"] for r in ("refused", "unserved", "timeout")}


@pytest.mark.parametrize("header", ["Request-Timeout-Ms", "x-slo-ttft-ms"])
@pytest.mark.parametrize(
    "value",
    ["", "0", "-5", "soon", "1e3", "1_000", "nan", "inf", "86400001", "9" * 400, "5 ms", "٣"],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages"])
async def test_a_value_that_makes_no_sense_is_refused_by_its_headers_name(
    server: Server, header: str, value: str, path: str
) -> None:
    fields = {"prompt": "a"}
    if path != "/v1/completions":
        fields = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}  # type: ignore[dict-item]
    headers = {header: value.encode()}
    response = await server.http.post(path, json=fields, headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert header.lower() in error["message"]
    assert error.get("param", header.lower()) == header.lower()
    assert not server.engine.requests


async def test_times_count_from_the_requests_arrival(server: Server) -> None:
    headers = {"x-slo-ttft-ms": "2500", "request-timeout-ms": "86400000"}
    assert (await ask(server, headers)).status_code == 200
    (request,) = server.engine.requests
    assert request.deadline is not None and request.end_by is not None
    assert request.end_by - request.deadline == pytest.approx(86400 - 2.5)
    assert 0 < request.arrival + 2.5 - request.deadline < 2.5
    assert (await ask(server, {"request-timeout-ms": "60000.5"})).status_code == 200
    assert server.engine.requests[1].deadline == server.engine.requests[1].end_by
    assert (await ask(server, {})).status_code == 200
    assert (server.engine.requests[2].deadline, server.engine.requests[2].end_by) == (None, None)


@pytest.mark.parametrize("header", ["Request-Timeout-Ms", "x-slo-ttft-ms"])
async def test_what_cannot_make_it_is_refused_with_the_forecast(
    server: Server, header: str
) -> None:
    server.engine.stats = BUSY
    response = await ask(server, {header: "9000"}, stream=True)
    error = error_of(response, 429, "deadline_unmeetable")
    assert "expected in 11205 ms" in error["message"], "100 tokens, 12 steps, half of this one"
    assert 2 <= int(response.headers["retry-after"]) <= 60
    assert not server.engine.requests
    assert (await ask(server, {header: "60000"})).status_code == 200
    assert await misses(server) == {"refused": 1, "unserved": 0, "timeout": 0}
    rejected = "vllm:admission_rejections_total[deadline_unmeetable]"
    assert (await scrape(server))[rejected] == 1


async def test_what_waits_already_is_part_of_the_forecast(server: Server) -> None:
    server.engine.stats = EngineStats(outlook=OUTLOOK)
    server.engine.resume.clear()
    first = asyncio.create_task(ask(server, {}, prompt=[70] * 200))
    await asyncio.sleep(0.01)
    error = error_of(await ask(server, {"x-slo-ttft-ms": "20000"}, n=3), 429, "deadline_unmeetable")
    assert "expected in 33600 ms" in error["message"], "300 tokens and 36 steps"
    server.engine.resume.set()
    assert (await first).status_code == 200


async def test_alone_it_is_tried_whatever_the_forecast(server: Server) -> None:
    """A forecast that is too high would never be corrected if nothing were computed."""
    server.engine.stats = EngineStats(outlook=OUTLOOK)
    assert (await ask(server, {"x-slo-ttft-ms": "9000"}, prompt=[70] * 200)).status_code == 200


@pytest.mark.parametrize("header", ["Request-Timeout-Ms", "x-slo-ttft-ms"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_what_expires_before_its_first_token_is_dropped(
    server: Server, header: str, stream: bool, n: int
) -> None:
    server.engine.resume.clear()
    response = await ask(server, {header: "30"}, stream=stream, n=n)
    error = error_of(response, 504, "deadline_exceeded")
    assert error["type"] == "timeout_error"
    assert header.lower() in error["message"]
    # On a machine that is busy with other things it may be too late before it is submitted.
    assert len(server.engine.aborted) == len(server.engine.requests)
    assert len(server.engine.requests) in (0, n)
    assert await misses(server) == {"refused": 0, "unserved": 1, "timeout": 0}


async def running(server: Server, headers: dict[str, str], **fields: Any) -> httpx.Response:
    """The answer to a request whose time is over when it has two tokens of twenty."""
    server.engine.script = lambda request: [70] * 20
    server.engine.resume.clear()
    server.engine.free_tokens = 2
    task = asyncio.create_task(ask(server, headers, max_tokens=20, **fields))
    await until(lambda: server.service.metrics.generation_tokens == 2)
    server.engine.expire()
    return await task


async def test_a_running_request_ends_when_its_time_is_over(server: Server) -> None:
    error_of(await running(server, {"Request-Timeout-Ms": "60000"}), 504, "deadline_exceeded")
    assert await misses(server) == {"refused": 0, "unserved": 0, "timeout": 1}


async def test_an_open_stream_ends_with_an_error_event(server: Server) -> None:
    response = await running(server, {"Request-Timeout-Ms": "60000"}, stream=True)
    assert response.status_code == 200
    *chunks, last = parse_events(response.text)
    assert len(chunks) == 2
    assert last["error"]["code"] == "deadline_exceeded"
    assert await misses(server) == {"refused": 0, "unserved": 0, "timeout": 1}


async def test_a_stream_with_its_first_token_has_met_that_deadline(server: Server) -> None:
    server.engine.resume.clear()
    server.engine.free_tokens = 1
    task = asyncio.create_task(ask(server, {"x-slo-ttft-ms": "1500"}))
    await until(lambda: server.service.metrics.generation_tokens == 1)
    await asyncio.sleep(1.6)
    server.engine.resume.set()
    assert (await task).status_code == 200
    assert await misses(server) == {"refused": 0, "unserved": 0, "timeout": 0}


async def test_time_that_passed_before_submission_counts(make_server: MakeServer) -> None:
    server = make_server()
    object.__setattr__(server.service, "clock", lambda: 1e12)
    error_of(await ask(server, {"Request-Timeout-Ms": "60000"}), 504, "deadline_exceeded")
    assert not server.engine.requests


async def test_texts_of_a_call_that_takes_too_long_are_dropped(make_pools: MakePools) -> None:
    pools = make_pools()
    fields = {"input": ["a", "b"]}
    late = await pools.http.post("/v1/embeddings", json=fields, headers={"request-timeout-ms": "x"})
    assert late.json()["error"]["param"] == "request-timeout-ms"
    pools.engine.hold = True
    headers = {"request-timeout-ms": "30"}
    late = await pools.http.post("/v1/embeddings", json=fields, headers=headers)
    error_of(late, 504, "deadline_exceeded")
    assert len(pools.engine.aborted) == 2
