"""The streaming client against a server whose bytes and times are known exactly."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from loadtest.client import Client
from loadtest.events import EventStream, Outcome
from loadtest.measure import summarize
from tests.loadtest.scripted_server import (
    DONE,
    HEAD,
    ManualClock,
    Reply,
    Script,
    event,
    plain,
    serving,
    usage,
)


async def ask(script: Script, times: int = 1, **options: Any) -> tuple[list[Outcome], int]:
    """Outcomes of requests sent one after another, and connections the server saw."""
    clock = ManualClock()
    async with serving(script, clock) as server:
        client = Client(server.url, clock=clock, **options)
        message = client.message("/v1/completions", b"{}")
        outcomes = [await client.stream(message) for _ in range(times)]
        client.close()
        return outcomes, server.connections


async def four_tokens(_: dict[str, Any], reply: Reply) -> None:
    await reply.send(HEAD)
    await reply.chunk(event("a"), after=0.5)
    await reply.chunk(event("b"), after=0.1)
    await reply.chunk(event("c") + event("d", "length"), after=0.3)
    await reply.chunk(usage(7, 4, cached=2), after=0.05)
    await reply.chunk(DONE)
    await reply.end()


async def test_every_time_is_the_scripted_one() -> None:
    (outcome,), _ = await ask(four_tokens)
    assert outcome.error is None
    times = [t - outcome.sent for t in outcome.chunk_times]
    assert times == pytest.approx([0.5, 0.6, 0.9, 0.9])
    assert outcome.ended - outcome.sent == pytest.approx(0.95)
    assert (outcome.input_tokens, outcome.output_tokens, outcome.cached_tokens) == (7, 4, 2)
    assert outcome.finish == "length"


async def test_the_summary_of_scripted_times() -> None:
    (outcome,), _ = await ask(four_tokens)
    outcome.scheduled, outcome.asked_output, outcome.asked_input = outcome.sent - 0.2, 4, 7
    summary = summarize([outcome])
    latency = {name: d["p50"] for name, d in summary["latency_ms"].items()}
    assert latency == pytest.approx({"ttft": 700, "tpot": 400 / 3, "itl": 100, "e2e": 1150})
    assert summary["send_lag_ms"]["max"] == pytest.approx(200)
    assert summary["throughput"]["output_tokens_per_second"] == pytest.approx(4 / 1.15)
    assert summary["disagreements"] == {}


async def test_connections_are_kept_and_reused() -> None:
    outcomes, connections = await ask(four_tokens, times=3)
    assert [o.error for o in outcomes] == [None] * 3
    assert connections == 1


async def test_connections_are_capped() -> None:
    running, most = 0, 0

    async def script(request: dict[str, Any], reply: Reply) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        await four_tokens(request, reply)

    clock = ManualClock()
    async with serving(script, clock) as server:
        client = Client(server.url, clock=clock, max_connections=2)
        message = client.message("/v1/completions", b"{}")
        outcomes = await asyncio.gather(*(client.stream(message) for _ in range(6)))
        client.close()
    assert [o.error for o in outcomes] == [None] * 6
    assert most == client.peak_connections == 2


async def test_an_idle_connection_that_the_server_closed_is_replaced() -> None:
    async def script(request: dict[str, Any], reply: Reply) -> None:
        await four_tokens(request, reply)
        reply.drop()

    outcomes, connections = await ask(script, times=2)
    assert [o.error for o in outcomes] == [None, None]
    assert connections == 2


def whole(*parts: bytes) -> Script:
    async def script(_: dict[str, Any], reply: Reply) -> None:
        for part in parts:
            await reply.send(part)
        reply.drop()

    return script


def body(data: bytes) -> bytes:
    return HEAD + b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (whole(plain("429 Too Many Requests", b'{"error":{}}')), "HTTP 429"),
        (whole(plain("500 Internal Server Error", b"oops")), "HTTP 500"),
        (whole(), "connection lost"),
        (whole(b"hello\r\n\r\n"), "connection lost"),
        (whole(HEAD, b"1\r\n"), "disconnected"),
        (whole(body(event("a"))), "truncated"),
        (whole(body(event("a", "stop"))), "truncated"),
        (whole(body(event("a") + DONE)), "truncated"),
        (
            whole(body(event("a") + b'data: {"error": {"message": "x"}}\n\n' + DONE)),
            "error in stream",
        ),
        (whole(body(b"data: {nonsense\n\n" + DONE)), "bad event"),
    ],
)
async def test_failures_are_told_apart(script: Script, error: str) -> None:
    (outcome,), _ = await ask(script)
    assert outcome.error == error


async def test_what_the_server_said_of_an_error_is_kept() -> None:
    (outcome,), _ = await ask(whole(plain("400 Bad Request", b'{"error":{"message":"no"}}')))
    assert (outcome.error, outcome.detail) == ("HTTP 400", '{"error":{"message":"no"}}')


async def test_a_silent_server_is_a_timeout() -> None:
    async def script(_: dict[str, Any], reply: Reply) -> None:
        await asyncio.sleep(30)

    (outcome,), _ = await ask(script, timeout=0.05)
    assert outcome.error == "timeout"


async def test_nobody_listening_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        client = Client(f"http://127.0.0.1:{taken.getsockname()[1]}")
        outcome = await client.stream(client.message("/v1/completions", b"{}"))
    assert outcome.error == "connection refused"


def test_events_do_not_depend_on_how_bytes_are_cut() -> None:
    chat = b'data:{"choices":[{"delta":{"role":"assistant"}}]}\r\n\r\n'
    chat += b'data: {"choices":[{"delta":{"content":"x"},"finish_reason":"stop"}]}\r\n\r\n'
    stream = event("é") + b": comment\n\n" + event("") + chat + usage(3, 2) + DONE
    for size in (1, 2, 7, 50, len(stream)):
        events = EventStream()
        events.status = 200
        for start in range(0, len(stream), size):
            events.now = float(start)
            events.feed(stream[start : start + size])
        outcome = events.outcome(0.0, 1.0)
        assert outcome.error is None
        assert len(outcome.chunk_times) == 2
        assert (outcome.input_tokens, outcome.output_tokens) == (3, 2)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_a_url_must_be_http(url: str) -> None:
    with pytest.raises(ValueError, match="not an http"):
        Client(url)


async def test_paths_and_key_reach_the_server() -> None:
    async def script(_: dict[str, Any], reply: Reply) -> None:
        await reply.send(plain("200 OK", b'{"data": []}'))

    clock = ManualClock()
    async with serving(script, clock) as server:
        client = Client(server.url + "/v1/", api_key="secret", clock=clock)
        assert await client.get("/v1/models") == {"data": []}
        assert b"Authorization: Bearer secret\r\n" in client.message("/v1/completions", b"")
        assert server.requests == [("/v1/models", {})]
        client.close()
