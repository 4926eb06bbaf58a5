"""One log line for each request that has ended, and the timings of those that ask."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import httpx
import pytest

from app.application import create_app
from app.flights.record import Lane, Load
from app.outputs.usage import PromptTokensDetails, Usage
from app.served import Served
from app.telemetry.accounts import Account
from app.telemetry.log_format import Facts, JsonFormatter
from app.telemetry.timings import Phases, Timings, timings_of
from batching.core.types import Request, SamplingParams
from tests.app.conftest import Live, Server
from tests.app.pooling import MakePools, make_pools, pool_folder
from tests.app.test_disconnect import send, until

__all__ = ["make_pools", "pool_folder"]

CHAT = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 4}


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "app.telemetry.accounts")
    return caplog


def facts(lines: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """What was said of each request."""
    found = [record.msg for record in lines.records if isinstance(record.msg, Facts)]
    assert all(fact.message == "request" for fact in found)
    return [dict(fact.values) for fact in found]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_has_one_line(
    server: Server, lines: pytest.LogCaptureFixture, stream: bool
) -> None:
    headers = {"x-request-id": "mine-1"}
    server.engine.script = lambda request: server.ids("hello world" * 9)
    answer = await server.http.post(
        "/v1/chat/completions", json=CHAT | {"n": 2, "stream": stream}, headers=headers
    )
    assert answer.status_code == 200, answer.text
    (fact,) = facts(lines)
    times = {name: fact.pop(name) for name in ("queue_ms", "prefill_ms", "decode_ms", "total_ms")}
    assert fact == {
        "request_id": "mine-1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "model": "tiny",
        "stream": stream,
        "choices": 2,
        "prompt_tokens": len(server.engine.requests[0].prompt),
        "cached_tokens": 0,
        "completion_tokens": 8,
        "finish": "length",
    }
    assert all(0 <= ms <= times["total_ms"] for ms in times.values())
    assert "secret" not in lines.text and "hello" not in lines.text


async def test_what_is_refused_has_a_line_with_the_reason(
    server: Server, lines: pytest.LogCaptureFixture
) -> None:
    await server.post("/v1/chat/completions", messages=[], nonsense=1)
    await server.http.get("/v1/models")
    (fact,) = facts(lines)
    assert (fact["status"], fact["error"]) == (400, "unknown_parameter")
    assert not {"model", "finish", "queue_ms"} & set(fact)


async def test_the_one_whose_client_left(server: Server, lines: pytest.LogCaptureFixture) -> None:
    server.engine.script = lambda request: [70] * 200
    server.engine.resume.clear()
    server.engine.free_tokens = 3
    async with Live(server) as live:
        reader, writer = await send(live.port, stream=True)
        await reader.readuntil(b"data: ")
        writer.transport.abort()
        await until(lambda: bool(facts(lines)))
    (fact,) = facts(lines)
    assert (fact["finish"], fact["completion_tokens"]) == ("abort", 3)


async def test_reasons_that_differ_are_all_told(
    server: Server, lines: pytest.LogCaptureFixture
) -> None:
    server.engine.script = lambda request: [70, 0] if request.id.endswith("-1") else [70] * 4
    await server.ok("/v1/completions", prompt="a", n=2, max_tokens=4)
    assert facts(lines)[0]["finish"] == "length,stop"


async def test_texts_that_were_pooled(
    make_pools: MakePools, lines: pytest.LogCaptureFixture
) -> None:
    pools = make_pools()
    answer = await pools.http.post("/v1/embeddings", json={"input": ["a secret", "b"]})
    assert answer.status_code == 200, answer.text
    (fact,) = facts(lines)
    assert fact["model"] in pools.models
    assert fact["texts"] == 2
    assert fact["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert fact["queue_ms"] == fact["prefill_ms"] == 0.0


async def test_a_listener_that_fails_breaks_nothing(
    server: Server, lines: pytest.LogCaptureFixture
) -> None:
    told: list[int] = []

    def fail(account: Account) -> None:
        raise ValueError("broken")

    served = Served(server.service)
    served.listeners = [fail, lambda account: told.append(account.status)]
    transport = httpx.ASGITransport(create_app(served), raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.get("/health")).status_code == 200
    assert told == [200]
    assert "ValueError: broken" in lines.text


# -- formats -------------------------------------------------------------------------------------


def logged(formatter: logging.Formatter, *messages: object, **kwargs: Any) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.error(*messages, **kwargs)
    return stream.getvalue()


def test_json_lines() -> None:
    line = json.loads(logged(JsonFormatter(), Facts("request", {"status": 200, "path": "/\n"})))
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "error", "message": "request", "status": 200, "path": "/\n"}
    assert json.loads(logged(JsonFormatter(), "%d of %s", 3, "x"))["message"] == "3 of x"
    try:
        raise ValueError("broken")
    except ValueError:
        text = logged(JsonFormatter(), "it", exc_info=True)
    assert text.count("\n") == 1
    assert "ValueError: broken" in json.loads(text)["traceback"]


def test_text_cannot_be_forged() -> None:
    path = "/x\n12:00:00 ERROR forged"
    text = logged(logging.Formatter(), Facts("request", {"path": path, "status": 404}))
    assert text == 'request path="/x\\n12:00:00 ERROR forged" status=404\n'


# -- timings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": [[70] * 5, [71] * 4], "n": 2, "max_tokens": 3}),
        ("/v1/chat/completions", CHAT | {"n": 2}),
    ],
)
async def test_timings_come_with_the_answer(
    server: Server, path: str, fields: dict[str, Any]
) -> None:
    answer = await server.ok(path, timings=True, **fields)
    timings, usage = answer["timings"], answer["usage"]
    assert timings["predicted_n"] == usage["completion_tokens"]
    assert timings["prompt_n"] + timings["cache_n"] == usage["prompt_tokens"]
    assert all(value >= 0 for value in timings.values())
    assert timings["queue_ms"] + timings["prompt_ms"] > 0
    assert "timings" not in await server.ok(path, **fields)


@pytest.mark.parametrize("usage", [False, True])
async def test_timings_are_the_last_thing_in_a_stream(server: Server, usage: bool) -> None:
    fields: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    *chunks, last = await server.events("/v1/chat/completions", timings=True, **CHAT, **fields)
    assert not any("timings" in chunk for chunk in chunks)
    assert last["choices"] == []
    assert last["timings"]["predicted_n"] == 4
    assert ("usage" in last) == usage


def test_timings_are_of_all_sequences_together() -> None:
    request = Request("r-0", [1] * 10, SamplingParams(5), arrival=1.0)
    lanes = [Lane(request, 0.5, Load()) for _ in range(2)]
    usage = Usage(10, 8, 18, PromptTokensDetails(4))
    assert Phases.of(lanes) == Phases(1.0, 0.0, 0.0, 0.0)
    assert timings_of(Phases.of(lanes), usage).predicted_per_second == 0.0
    (lanes[0].scheduled, lanes[0].first, lanes[0].last) = (1.5, 2.0, 4.0)
    assert Phases.of(lanes).prefill is None, "not all have their first token"
    (lanes[1].scheduled, lanes[1].first, lanes[1].last) = (1.25, 2.25, 3.25)
    phases = Phases.of(lanes)
    assert (phases.queue, phases.prefill, phases.decode) == (0.25, 1.0, 1.75)
    assert timings_of(phases, usage) == Timings(
        queue_ms=250.0,
        cache_n=4,
        prompt_n=6,
        prompt_ms=1000.0,
        prompt_per_token_ms=166.667,
        prompt_per_second=6.0,
        predicted_n=8,
        predicted_ms=1750.0,
        predicted_per_token_ms=218.75,
        predicted_per_second=4.571,
    )
