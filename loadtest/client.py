"""A light streaming HTTP/1.1 client: it must cost far less than the server it measures.

One protocol object per connection, a C parser (httptools) for HTTP, one typed decode (msgspec)
per SSE event that keeps only what is measured, and one clock reading per received segment.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from loadtest.events import EventStream, Outcome


class _Connection(asyncio.Protocol):
    """One keep-alive connection, carrying one exchange at a time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._events: EventStream | None = None
        self._done: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._keep_alive = True

    @property
    def open(self) -> bool:
        """It can carry another exchange."""
        return self._keep_alive and self._transport is not None and not self._transport.is_closing()

    async def exchange(self, message: bytes, events: EventStream) -> None:
        """Send one request and feed `events` until the response is complete.

        Raises `ConnectionError` if the server closes before that.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the server closed the connection")
        self._events, self._done = events, asyncio.get_running_loop().create_future()
        self._transport.write(message)
        await self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        if self._events is not None:
            self._events.now = self._clock()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"not HTTP: {error}"))
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._keep_alive = False
        self._fail(error or ConnectionResetError("the server closed the connection"))

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    # httptools callbacks

    def on_headers_complete(self) -> None:
        if self._events is not None:
            self._events.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._events is not None:
            self._events.feed(body)

    def on_message_complete(self) -> None:
        self._keep_alive = self._parser.should_keep_alive()
        self._parser = httptools.HttpResponseParser(self)
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


class Client:
    """Talks to one server over at most `max_connections` connections.

    `clock` gives seconds; every time in an `Outcome` is read from it.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        max_connections: int = 1024,
        timeout: float = 600.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or parts.hostname is None:
            raise ValueError(f"{url!r} is not an http(s) URL")
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = f"Host: {parts.netloc}\r\nAccept: */*\r\n"
        if api_key:
            self._headers += f"Authorization: Bearer {api_key}\r\n"
        self._clock, self._timeout = clock, timeout
        self._free = asyncio.Semaphore(max_connections)
        self._idle: list[_Connection] = []
        self._open = 0
        self.peak_connections = 0

    def message(self, path: str, body: bytes) -> bytes:
        """A whole POST request, rendered before the run so that sending costs one write."""
        return (
            f"POST {self._base}{path} HTTP/1.1\r\n{self._headers}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body

    async def stream(self, message: bytes, *, keep_text: bool = False) -> Outcome:
        """Send a rendered request and read its event stream. Never raises for a failed request."""
        return await self._ask(message, EventStream(keep_text=keep_text))

    async def plain(self, message: bytes) -> Outcome:
        """The same for a response that is one JSON body: it has no text, only `usage`."""
        return await self._ask(message, EventStream(keep_body=True))

    async def _ask(self, message: bytes, events: EventStream) -> Outcome:
        async with self._free:
            sent = self._clock()
            try:
                async with asyncio.timeout(self._timeout):
                    sent = await self._exchange(message, events)
                    if events.keep_body:
                        events.close_plain()
            except TimeoutError:
                events.error = "timeout"
            except ConnectionRefusedError:
                events.error = "connection refused"
            except OSError:
                events.error = "disconnected" if events.status else "connection lost"
        return events.outcome(sent, self._clock())

    async def get(self, path: str) -> Any:
        """A GET's JSON body. Raises `OSError` (no server) or `ValueError` (no JSON, or not 200)."""
        return msgspec.json.decode(await self.get_bytes(path))

    async def get_bytes(self, path: str) -> bytes:
        """A GET's body. Raises `OSError` (no server) or `ValueError` (not 200)."""
        events = EventStream(keep_body=True)
        await self._exchange(
            f"GET {self._base}{path} HTTP/1.1\r\n{self._headers}\r\n".encode(), events
        )
        if events.status != 200:
            raise ValueError(f"{path} answered {events.status}")
        return events.body

    def close(self) -> None:
        """Close all idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _exchange(self, message: bytes, events: EventStream) -> float:
        """Run one exchange. Returns when its request was written."""
        while True:
            reused = self._pop_idle()
            connection = reused or await self._connect()
            sent = self._clock()
            try:
                await connection.exchange(message, events)
            except BaseException as error:
                connection.close()
                self._open -= 1
                # A server may close an idle connection just as we reuse it: not its failure.
                if reused is not None and isinstance(error, OSError) and not events.status:
                    continue
                raise
            self._put_back(connection)
            return sent

    def _pop_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
            self._open -= 1
        return None

    def _put_back(self, connection: _Connection) -> None:
        if connection.open:
            self._idle.append(connection)
        else:
            connection.close()
            self._open -= 1

    async def _connect(self) -> _Connection:
        context = ssl.create_default_context() if self._tls else None
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(self._clock), self._host, self._port, ssl=context
        )
        self._open += 1
        self.peak_connections = max(self.peak_connections, self._open)
        return connection
