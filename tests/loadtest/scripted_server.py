"""An HTTP server whose every byte a test decides, on a clock that only the test moves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"


class ManualClock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0
        self._read = asyncio.Event()

    def __call__(self) -> float:
        self._read.set()
        return self.now

    async def after_next_read(self) -> None:
        """Return once somebody looked at the clock again."""
        self._read.clear()
        await self._read.wait()


class Reply:
    """What a script writes to one request."""

    def __init__(self, writer: asyncio.StreamWriter, clock: ManualClock, path: str = "") -> None:
        self.path = path
        self._writer = writer
        self._clock = clock

    async def send(self, data: bytes, after: float = 0.0) -> None:
        """Raw bytes, `after` seconds later; returns when the client has received them."""
        self._clock.now += after
        received = asyncio.ensure_future(self._clock.after_next_read())
        await asyncio.sleep(0)  # let it start to wait
        self._writer.write(data)
        await received

    async def chunk(self, data: bytes, after: float = 0.0) -> None:
        """One HTTP chunk."""
        await self.send(b"%x\r\n%s\r\n" % (len(data), data), after)

    async def end(self) -> None:
        """The end of a chunked body."""
        await self.send(b"0\r\n\r\n")

    def drop(self) -> None:
        """Close the connection at once."""
        self._writer.transport.abort()


def event(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    """One completion event."""
    choices = [{"index": 0, "text": text or "", "logprobs": None, "finish_reason": finish}]
    content = {"id": "c", "object": "text_completion", "model": "m", "choices": choices, **more}
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def usage(prompt: int, completion: int, cached: int = 0) -> bytes:
    """The last event of a stream with `include_usage`."""
    counts = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


def plain(status: str, body: bytes) -> bytes:
    """A whole response with a length."""
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


Script = Callable[[dict[str, Any], Reply], Awaitable[None]]


class Server:
    """Runs the script for each request; counts connections."""

    def __init__(self, script: Script, clock: ManualClock) -> None:
        self._script = script
        self._clock = clock
        self.url = ""
        self.connections = 0
        self.requests: list[tuple[str, dict[str, Any]]] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = dict(
                    line.lower().split(": ", 1) for line in head.splitlines()[1:] if ": " in line
                )
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                request = json.loads(body) if body else {}
                path = head.split()[1]
                self.requests.append((path, request))
                await self._script(request, Reply(writer, self._clock, path))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(script: Script, clock: ManualClock) -> AsyncIterator[Server]:
    """The server, listening on a port of its own."""
    server = Server(script, clock)
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()
