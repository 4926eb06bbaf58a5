"""A client that goes away frees its request at once; a slow one delays nobody. Real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from batching.worker.protocol import Capabilities
from tests.app.conftest import Live, MakeServer, Server, parse_events

PATIENCE = 10.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
async def live(make_server: MakeServer) -> AsyncIterator[tuple[Server, int]]:
    server = make_server()
    async with Live(server) as running:
        yield server, running.port


async def send(
    port: int, path: str = "/v1/completions", sock: socket.socket | None = None, **fields: object
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = {"host": "127.0.0.1", "port": port} if sock is None else {"sock": sock}
    reader, writer = await asyncio.open_connection(**address, limit=4096 if sock else 65536)  # type: ignore[arg-type]
    if path == "/v1/completions":
        fields = {"prompt": [70], "max_tokens": 200, "seed": 1} | fields
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


async def test_news_may_be_told_after_the_end(live: tuple[Server, int]) -> None:
    """As the engine's client does, whose message came just before the client went away."""
    server, port = live
    server.engine.resume.clear()
    _, writer = await send(port, stream=True)
    await until(lambda: server.engine.running == 1)
    (stream,) = server.engine.streams.values()
    writer.close()
    await until(lambda: server.service.metrics.finished["abort"] == 1)
    stream.on_news()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_before_the_first_token(live: tuple[Server, int], stream: bool, n: int) -> None:
    server, port = live
    server.engine.resume.clear()
    _, writer = await send(port, stream=stream, n=n)
    await until(lambda: server.engine.running == n)
    assert server.service.admission.requests == n
    writer.close()
    await until(lambda: len(server.engine.aborted) == n)
    await until(lambda: server.service.metrics.finished["abort"] == n)
    assert server.engine.running == 0
    assert server.service.admission.requests == 0


@pytest.mark.parametrize("n", [1, 3])
async def test_in_the_middle_of_a_stream(live: tuple[Server, int], n: int) -> None:
    server, port = live
    server.engine.script = lambda request: [70] * 200
    server.engine.resume.clear()
    server.engine.free_tokens = 3
    reader, writer = await send(port, stream=True, n=n)
    await reader.readuntil(b"data: ")
    writer.transport.abort()
    await until(lambda: len(server.engine.aborted) == n)
    await until(lambda: server.service.metrics.finished["abort"] == n)


@pytest.mark.parametrize("n", [1, 3])
async def test_what_was_streamed_counts(live: tuple[Server, int], n: int) -> None:
    server, port = live
    server.engine.script = lambda request: [70] * 200
    server.engine.resume.clear()
    server.engine.free_tokens = 3
    options = {"include_usage": True, "continuous_usage_stats": True}
    reader, writer = await send(
        port, prompt=[[70] * 4, [71] * 5], stream=True, n=n, stream_options=options
    )
    usage = {"completion_tokens": 0}
    while usage["completion_tokens"] < 2 * n * 3:
        line = await reader.readuntil(b"\n")
        if line.startswith(b"data: "):
            usage = json.loads(line.removeprefix(b"data: "))["usage"]
    writer.transport.abort()
    metrics = server.service.metrics
    await until(lambda: metrics.finished["abort"] == 2 * n)
    assert metrics.generation_tokens == usage["completion_tokens"]
    assert metrics.prompt_tokens == usage["prompt_tokens"] == 9


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 200}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [0, 3])
async def test_of_every_chat(
    live: tuple[Server, int], path: str, fields: dict[str, object], stream: bool, tokens: int
) -> None:
    server, port = live
    server.engine.script = lambda request: [70] * 200
    server.engine.resume.clear()
    server.engine.free_tokens = tokens
    reader, writer = await send(port, path, stream=stream, **fields)
    await until(lambda: server.service.metrics.generation_tokens == tokens)
    await until(lambda: server.engine.running == 1)
    if stream and tokens:
        await reader.readuntil(b"data: ")
    writer.transport.abort()
    await until(lambda: len(server.engine.aborted) == 1)
    await until(lambda: server.service.metrics.finished["abort"] == 1)
    assert server.service.admission.requests == 0


async def test_a_slow_reader_delays_nobody_and_misses_nothing(live: tuple[Server, int]) -> None:
    server, port = live
    server.engine.script = lambda request: server.ids("hello world ") * 100
    fields = {"stream": True, "max_tokens": 200}
    slow, slow_writer = await send(port, **fields)
    fast, fast_writer = await send(port, **fields)
    texts = []
    for reader in (fast, slow):
        events = (await reader.readuntil(b"[DONE]")).split(b"data: ")[1:-1]
        chunks = [json.loads(event.split(b"\n\n")[0]) for event in events]
        texts.append("".join(chunk["choices"][0]["text"] for chunk in chunks))
    assert texts[0] == texts[1]
    assert len(texts[0]) > 300
    slow_writer.close()
    fast_writer.close()


async def test_a_reader_that_does_not_read_costs_its_own_answer_and_a_buffer(
    make_server: MakeServer, capabilities: Capabilities
) -> None:
    caps = msgspec.structs.replace(capabilities, max_model_len=50_000, num_blocks=4000)
    server = make_server(lambda request: [70] * 40_000, caps=caps)
    async with Live(server) as live:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", live.port))
        fields = {"prompt": [70], "max_tokens": 40_000, "stream": True}
        reader, writer = await send(live.port, sock=connection, **fields)
        await until(lambda: len(server.engine.requests) == 1 and server.engine.running == 0)
        (protocol,) = live.connections
        # The engine is through; what the socket did not take is tokens in one slot, not text.
        assert protocol.transport.get_write_buffer_size() < 2 * 65536
        assert server.service.metrics.generation_tokens < 40_000
        tail = b""
        while b"[DONE]" not in tail:
            piece = await reader.read(65536)
            assert piece, "the stream ended early"
            tail = (tail + piece)[-100:]
        assert server.service.metrics.generation_tokens == 40_000
        writer.close()


@pytest.mark.parametrize("free_tokens", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_requests_cut_off_at_the_end_of_draining_are_told(
    server: Server, stream: bool, free_tokens: int
) -> None:
    """uvicorn cancels the tasks of requests that are open when the time to drain is over."""
    server.engine.script = lambda request: [70] * 200
    server.engine.resume.clear()
    server.engine.free_tokens = free_tokens
    fields = {"prompt": [70], "max_tokens": 200, "stream": stream}
    task = asyncio.create_task(server.http.post("/v1/completions", json=fields))
    metrics = server.service.metrics
    await until(lambda: server.engine.running == 1 and metrics.generation_tokens == free_tokens)
    task.cancel()
    response = await task
    if stream and free_tokens:
        *chunks, error = parse_events(response.text)
        assert len(chunks) == free_tokens
    else:
        assert response.status_code == 503
        error = response.json()
    assert error["error"]["code"] == "shutting_down"
    assert metrics.finished == {"abort": 1}


async def test_connections_are_kept_for_the_next_request(live: tuple[Server, int]) -> None:
    server, port = live
    server.say("hello")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = b'{"prompt": "a"}'
    for _ in range(3):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
                     % (len(body), body))  # fmt: skip
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        answer = json.loads(await reader.readexactly(length))
        assert answer["choices"][0]["text"] == "hello"
    writer.close()
    assert server.engine.aborted == []
