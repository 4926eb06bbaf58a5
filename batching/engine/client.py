"""The front end's asyncio handle on an engine child: start it, submit requests, read streams.

Everything here runs on the event loop of one thread. Requests and aborts made in one iteration
of the loop leave as one message; a step's events arrive as one message and wake each stream once.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Callable

import msgspec

from batching.core.types import EngineStats, FinishReason, Request, TokenEvent
from batching.engine.channel import FrameBuffer, encode_frame
from batching.engine.messages import (
    Configure,
    Failed,
    FromEngine,
    Progress,
    Ready,
    StepOutput,
    Submit,
)
from batching.worker.protocol import Capabilities
from config.child_environment import child_environment
from config.settings import EngineSettings

_SOCKET_BUFFER_BYTES = 1 << 22


class EngineStartError(RuntimeError):
    """The engine could not start; the message is fit for a user's eyes."""


class EngineDeadError(RuntimeError):
    """The engine process ended while the request was open."""


class RequestStream:
    """One request's events: an async iterator with one slot.

    If the reader is slow, events merge (tokens and logprobs are concatenated), so that a stream
    holds at most one event and never delays another.
    """

    def __init__(self, request: Request, abort: Callable[[str], None]) -> None:
        self.request = request
        self._abort = abort
        self._pending: TokenEvent | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._finished = False  # the last event was pushed
        self._error: Exception | None = None

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> TokenEvent:
        """The next event; the last has `finish` set. Raises `EngineDeadError`."""
        while self._pending is None:
            if self._error is not None:
                raise self._error
            if self._finished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        event, self._pending = self._pending, None
        return event

    def cancel(self) -> None:
        """Abort the request and end the stream. Idempotent; harmless after the end."""
        if not self._finished:
            self.push(TokenEvent(self.request.id, finish=FinishReason.ABORT))
            self._abort(self.request.id)

    def push(self, event: TokenEvent) -> None:
        """Add an event (the client's side)."""
        self._pending = event if self._pending is None else _merge(self._pending, event)
        self._finished = self._finished or event.finish is not None
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream with an error (the client's side)."""
        self._error = error
        self._finished = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _merge(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    return TokenEvent(
        id=first.id,
        tokens=first.tokens + second.tokens,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        cached_tokens=first.cached_tokens if second.cached_tokens is None else second.cached_tokens,
        finish=second.finish,
        error=second.error,
        timing=second.timing,
    )


class EngineClient:
    """Starts and talks to one engine child process."""

    def __init__(
        self, settings: EngineSettings, on_step: Callable[[StepOutput], None] | None = None
    ) -> None:
        self._settings = settings
        self._on_step = on_step
        self._on_progress: Callable[[Progress], None] | None = None
        self._streams: dict[str, RequestStream] = {}
        self._outbox_requests: list[Request] = []
        self._outbox_aborts: list[str] = []
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.Transport | None = None
        self._ready: asyncio.Future[Capabilities] | None = None
        self._failure: str | None = None
        self._last_message = 0.0
        self.stats = EngineStats()
        self.capabilities: Capabilities | None = None

    async def start(self, on_progress: Callable[[Progress], None] | None = None) -> Capabilities:
        """Launch the child and wait until it serves. Raises `EngineStartError`."""
        loop = asyncio.get_running_loop()
        self._on_progress = on_progress
        self._ready = loop.create_future()
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "batching.engine.child", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                env=child_environment(self._settings.threads),
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C reaches only the front end
            )
        self._transport, _ = await loop.create_connection(lambda: _Link(self), sock=ours)
        self._transport.write(encode_frame(Configure(self._settings.model_dump_json().encode())))
        try:
            self.capabilities = await self._ready
        except BaseException:
            await self.close()
            raise
        return self.capabilities

    @property
    def alive(self) -> bool:
        """The child runs and has not failed."""
        return self.capabilities is not None and self._failure is None

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the child last said anything; it does so after every step and second."""
        return time.monotonic() - self._last_message

    @property
    def failure(self) -> str | None:
        """Why the engine ended, or None."""
        return self._failure

    def submit(self, request: Request) -> RequestStream:
        """Queue a request. Raises `EngineDeadError` if there is no engine."""
        if not self.alive:
            raise EngineDeadError(self._failure or "the engine is not running")
        stream = RequestStream(request, self.abort)
        self._streams[request.id] = stream
        self._schedule_flush()
        self._outbox_requests.append(request)
        return stream

    def abort(self, request_id: str) -> None:
        """Stop a request and free what it holds. Unknown ids are ignored."""
        if self._streams.pop(request_id, None) is not None and self.alive:
            self._schedule_flush()
            self._outbox_aborts.append(request_id)

    async def close(self, grace: float = 0.0) -> None:
        """End the child; open streams fail. With `grace`, wait that long for them first."""
        deadline = time.monotonic() + grace
        while self._streams and self.alive and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._fail("the engine was shut down")
        if self._transport is not None:
            self._transport.close()
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), timeout=5.0)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    def _schedule_flush(self) -> None:
        if not (self._outbox_requests or self._outbox_aborts):
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            message = Submit(self._outbox_requests, self._outbox_aborts)
            self._transport.write(encode_frame(message))
        self._outbox_requests, self._outbox_aborts = [], []

    def receive(self, message: FromEngine) -> None:
        """Handle one message of the child (called by the link)."""
        self._last_message = time.monotonic()
        match message:
            case StepOutput():
                self._deliver(message)
            case Progress():
                if self._on_progress is not None:
                    self._on_progress(message)
            case Ready():
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(message.capabilities)
            case Failed():
                self._fail(message.message)

    def disconnected(self) -> None:
        """The child closed its end (called by the link)."""
        self._fail("the engine process ended unexpectedly")

    def _deliver(self, output: StepOutput) -> None:
        self.stats = output.stats
        for event in output.events:
            stream = self._streams.get(event.id)
            if stream is None:
                continue  # aborted meanwhile
            if event.finish is not None:
                del self._streams[event.id]
            stream.push(event)
        if self._on_step is not None:
            self._on_step(output)

    def _fail(self, message: str) -> None:
        if self._failure is not None:
            return
        self._failure = message
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(EngineStartError(message))
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(EngineDeadError(message))


class _Link(asyncio.Protocol):
    """Turns the child's bytes into messages."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._frames = FrameBuffer()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            self._client.receive(self._decoder.decode(body))

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.disconnected()
