"""Deadlines on a real engine: what is late is refused, dropped or ended, and frees what it held."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.e2e.server_process import ServerProcess

LONG = {"prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True, "n": 16}


def missed(server: ServerProcess) -> float:
    return server.metric("slipstream_deadline_misses_total")


@pytest.mark.parametrize("stream", [False, True])
def test_a_running_request_ends_when_its_time_is_over(server: ServerProcess, stream: bool) -> None:
    before = missed(server)
    headers = {"Request-Timeout-Ms": "1000"}
    fields = LONG | {"stream": stream}
    answer = httpx.post(f"{server.url}/v1/completions", json=fields, headers=headers, timeout=60)
    if stream:
        assert answer.status_code == 200
        *_, chunk, last, done, end = answer.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        assert json.loads(chunk.removeprefix("data: "))["choices"][0]["finish_reason"] is None
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 504
        error = answer.json()["error"]
    assert error["code"] == "deadline_exceeded"
    assert "request-timeout-ms" in error["message"]
    assert missed(server) - before == 1
    server.wait_idle()


async def test_what_cannot_be_served_in_time_is_refused_with_a_forecast(
    server: ServerProcess,
) -> None:
    before = missed(server)
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:

        async def post(number: int, **headers: str) -> httpx.Response:
            fields: dict[str, Any] = {"prompt": [number + 3, *[9] * 1500], "max_tokens": 8}
            fields |= {"temperature": 0, "ignore_eos": True}
            return await http.post("/v1/completions", json=fields, headers=headers)

        fields = {"prompt": "Once", "max_tokens": 32, "ignore_eos": True}  # steps to learn from
        await http.post("/v1/completions", json=fields)
        crowd = [asyncio.create_task(post(n)) for n in range(40)]
        async with asyncio.timeout(60):
            while await asyncio.to_thread(server.metric, "vllm:num_requests_waiting") < 16:
                await asyncio.sleep(0.01)
        refused = await post(99, **{"x-slo-ttft-ms": "200"})
        patient = await post(98, **{"x-slo-ttft-ms": "100000"})
        assert [answer.status_code for answer in await asyncio.gather(*crowd)] == [200] * 40
    assert refused.status_code == 429, refused.text
    assert refused.json()["error"]["code"] == "deadline_unmeetable"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert patient.status_code == 200
    assert missed(server) - before == 1
    server.wait_idle()
