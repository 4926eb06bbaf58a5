"""What comes over the socket before it is a request: malformed, oversized, slow."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from app.http.protocol import MAX_HEAD_BYTES, HttpProtocol
from tests.app.conftest import Live, MakeServer

GOOD = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


class Hasty(HttpProtocol):
    head_seconds = 0.2
    request_seconds = 0.4


@pytest.fixture
async def port(make_server: MakeServer) -> AsyncIterator[int]:
    async with Live(make_server(), Hasty) as live:
        yield live.port


async def exchange(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Everything the server says until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reading = asyncio.create_task(reader.read())
    try:
        for piece in pieces:
            if not reading.done():
                writer.write(piece)
                await asyncio.sleep(pause)
        return await asyncio.wait_for(reading, 20)
    finally:
        writer.close()


def check(answer: bytes, status: int) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0].startswith(f"HTTP/1.1 {status} ")
    names = {line.partition(":")[0].lower() for line in lines[1:]}
    assert {"x-request-id", "content-length", "connection"} <= names
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "invalid_http"


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n",
    ],
    ids=lambda data: repr(data[:40]),
)
async def test_what_is_not_http_is_a_400_in_our_shape(port: int, data: bytes) -> None:
    check(await exchange(port, data), 400)
    assert (await exchange(port, GOOD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")))[
        :15
    ] == b"HTTP/1.1 200 OK"


async def test_a_head_without_end_is_refused(port: int) -> None:
    start = b"GET / HTTP/1.1\r\nX: "
    check(await exchange(port, start + b"a" * (MAX_HEAD_BYTES + 1 - len(start))), 431)


@pytest.mark.parametrize(
    "pieces",
    [(), (b"GET /hea",), (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n", b"{")],
    ids=["nothing", "half a head", "half a body"],
)
async def test_a_request_that_never_ends_is_cut_off(port: int, pieces: tuple[bytes, ...]) -> None:
    check(await exchange(port, *pieces), 408)


async def test_dripping_bytes_do_not_extend_the_time(port: int) -> None:
    drip = [bytes([byte]) for byte in GOOD[:20]]
    check(await exchange(port, *drip, pause=0.02), 408)


async def test_a_kept_connection_may_rest_and_then_be_slow_again(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):
        writer.write(GOOD)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
        await asyncio.sleep(0.3)  # longer than a head may take
    writer.write(GOOD[:9])
    check(await asyncio.wait_for(reader.read(), 20), 408)
    writer.close()


async def test_a_long_generation_is_not_a_slow_request(make_server: MakeServer) -> None:
    server = make_server()
    async with Live(server, Hasty) as live:
        server.engine.resume.clear()
        body = b'{"prompt": "a", "max_tokens": 2}'
        call = asyncio.create_task(
            exchange(
                live.port,
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body,
            )
        )
        await asyncio.sleep(0.8)
        server.engine.resume.set()
        assert (await call).startswith(b"HTTP/1.1 200 OK")


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
CLOSE = b"Connection: close\r\n\r\n"


@pytest.mark.parametrize("together", [True, False])
async def test_trailers_are_no_headers(make_server: MakeServer, together: bool) -> None:
    server = make_server()
    async with Live(server) as live:
        body = b'{"prompt": "a", "max_tokens": 2}'
        trailer = b"X-Gateway-Inference-Fairness-Id: other\r\nX-Request-Id: other\r\n\r\n"
        pieces = (CHUNKED + CLOSE, b"%x\r\n%b\r\n0\r\n" % (len(body), body), trailer)
        sent = (b"".join(pieces),) if together else pieces
        answer = await exchange(live.port, *sent, pause=0.01)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"x-request-id: other" not in answer
        assert [request.tenant for request in server.engine.requests] == [""]


async def feed(live: Live, *reads: bytes) -> bytes:
    """What the server says to exactly these reads, until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
    while not live.connections:
        await asyncio.sleep(0.005)
    (protocol,) = live.connections
    for data in reads:
        if not protocol.transport.is_closing():
            protocol.data_received(data)
    try:
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


@pytest.mark.parametrize("line", [b"a: " + b"b" * 1020 + b"\r\n", b"b" * 1024], ids=["many", "one"])
async def test_trailers_without_end_are_refused(make_server: MakeServer, line: bytes) -> None:
    async with Live(make_server()) as live:
        start = CHUNKED + b"\r\n1\r\n{\r\n0\r\n" + (b"" if b":" in line else b"a: ")
        check(await feed(live, start, *[line] * 100), 431)


async def test_a_large_head_in_one_read_is_refused(make_server: MakeServer) -> None:
    async with Live(make_server()) as live:
        head = b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n"
        check(await feed(live, head), 431)


async def test_tiny_chunks_of_a_large_body_are_no_head(make_server: MakeServer) -> None:
    body = b'{"prompt": "a", "max_tokens": 2}' + b" " * 30_000
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    assert len(chunks) - len(body) > 2 * MAX_HEAD_BYTES
    async with Live(make_server()) as live:
        pieces = [chunks[i : i + 10_001] for i in range(0, len(chunks), 10_001)]
        answer = await exchange(live.port, CHUNKED + CLOSE, *pieces, pause=0.001)
        assert answer.startswith(b"HTTP/1.1 200 OK")
