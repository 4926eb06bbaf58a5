"""uvicorn's HTTP protocol with what it lacks: limits on receiving a request, and our errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from uuid import uuid4

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.flights.record import Flight
from app.http.errors import ApiError

MAX_HEAD_BYTES = 65536  # the parser would collect a header without end


class HttpProtocol(HttpToolsProtocol):
    """One connection. A client that sends no whole request in time is told so and cut off.

    A request that comes at once, as nearly all do, costs no timer.
    """

    head_seconds = 30.0  # for the request line and headers, from the first byte or the connection
    request_seconds = 300.0  # for head and body: 16 MiB at half a megabit a second

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.on_pause: Callable[[bool], None] | None = None  # told when the client stops reading
        self._in_head = self._receiving = True
        self._loose_bytes = 0  # since the last that were body, or ended a head or message
        self._timer: asyncio.TimerHandle | None = None
        self._start_timer(self.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        in_head = self._in_head
        self._loose_bytes += len(data)
        super().data_received(data)
        if self._receiving and self._loose_bytes > MAX_HEAD_BYTES:  # a head, or trailers
            self._refuse_head()
            return
        if not self._receiving:
            self._stop_timer()
        elif self._timer is None or (in_head and not self._in_head):
            self._start_timer(self.head_seconds if self._in_head else self.request_seconds)

    def on_message_begin(self) -> None:
        self._in_head = self._receiving = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers are dropped: no proxy has looked at them, and they would count as headers."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._loose_bytes = 0
        # All of it may have come in one read.
        if len(self.url) + sum(len(n) + len(v) + 4 for n, v in self.headers) > MAX_HEAD_BYTES:
            self._refuse_head()
            raise ValueError("head too large")  # ends the parsing
        self.scope["state"]["connection"] = self
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._loose_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._receiving = False
        self._loose_bytes = 0
        super().on_message_complete()

    @property
    def paused(self) -> bool:
        """The client does not read."""
        return self.flow.write_paused

    def write_chunk(self, body: bytes) -> None:
        """More of a body without a length that is being sent, without waiting."""
        if not self.transport.is_closing():
            self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def pause_writing(self) -> None:
        """The client does not read as fast as it is written to."""
        super().pause_writing()
        if (flight := self._flight()) is not None:
            flight.stall(time.monotonic())
        if self.on_pause is not None:
            self.on_pause(True)

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if (flight := self._flight()) is not None:
            flight.unstall(time.monotonic())
        if self.on_pause is not None:
            self.on_pause(False)

    def _flight(self) -> Flight | None:
        """The record of the request that is being answered."""
        return None if self.cycle is None else self.cycle.scope["state"].get("flight")

    def send_400_response(self, msg: str) -> None:
        """Called for bytes that are not HTTP."""
        self._refuse(400, "the request is not valid HTTP")

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._timed_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timed_out(self) -> None:
        self._refuse(408, "the request did not arrive in time")

    def _refuse_head(self) -> None:
        self._refuse(431, f"the request's headers are larger than {MAX_HEAD_BYTES} bytes")

    def _refuse(self, status: int, message: str) -> None:
        """Answer, unless an answer is under way, and close."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            phrase = HTTPStatus(status).phrase
            body = ApiError(message, status=status, code="invalid_http").body()
            head = (
                f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nx-request-id: {uuid4().hex}\r\n"
                "connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
