"""Server-sent events: pre-rendered envelopes, and the response that writes them.

The part of a chunk that never changes is rendered once per choice; a token costs one JSON string
and one join. Nothing here builds a model or a dict per token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.http.errors import ApiError, engine_dead, shutting_down, with_request_id
from batching.engine.client import EngineDeadError

if TYPE_CHECKING:
    from app.http.protocol import HttpProtocol

DONE = b"data: [DONE]\n\n"
# What a client hears that waits long: a comment, which it ignores and no proxy takes for silence.
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 15.0

# What is around the news in a choice: the text of a completion, the text of a chat, a whole delta.
TEXT, CONTENT, DELTA = (b'"text":', b""), (b'"delta":{"content":', b"}"), (b'"delta":', b"")

_encode = msgspec.json.encode


class StreamEnd(NamedTuple):
    """The last bytes of a stream: when all went well, and when it is cut by an error."""

    done: bytes
    failed: Callable[[ApiError], bytes]


OPENAI_END = StreamEnd(DONE, lambda error: b"data: " + error.body() + b"\n\n" + DONE)


def event_bytes(name: str, data: Any) -> bytes:
    """A named event."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _encode(data))


class Envelope:
    """Renders the chunks of one response: `data: {...}` with everything but the news fixed."""

    def __init__(
        self,
        *,
        id: str,
        object: str,
        created: int,
        model: str,
        choices: int,
        around: tuple[bytes, bytes],
    ) -> None:
        head = _encode({"id": id, "object": object, "created": created, "model": model})
        self._head = b"data: " + head[:-1] + b',"choices":['
        before, self._after_text = around
        self._plain = self._after_text + b',"logprobs":null,"finish_reason":null}]'
        self._prefix = [self._head + b'{"index":%d,' % index + before for index in range(choices)]

    def role(self, index: int, usage: bytes) -> bytes:
        """The first chunk of a chat choice, the only one with the role."""
        return (
            self._head
            + b'{"index":%d,"delta":{"role":"assistant","content":""},' % index
            + b'"logprobs":null,"finish_reason":null}]'
            + usage
            + b"}\n\n"
        )

    def text(self, index: int, text: str, usage: bytes) -> bytes:
        """A chunk with text only, as nearly all are."""
        return b"".join((self._prefix[index], _encode(text), self._plain, usage, b"}\n\n"))

    def delta(
        self,
        index: int,
        news: str | dict[str, Any],
        usage: bytes,
        *,
        logprobs: msgspec.Struct | None = None,
        finish: str | None = None,
        stop_reason: str | int | None = None,
        more: bytes = b"",
    ) -> bytes:
        """A chunk. `usage` is `,"usage":…` as JSON text, or nothing; `more` is in the choice."""
        parts = [self._prefix[index], _encode(news), self._after_text, b',"logprobs":']
        parts.append(b"null" if logprobs is None else _encode(logprobs))
        if finish is None:
            parts += (b',"finish_reason":null', more, b"}]")
        else:
            parts += (b',"finish_reason":', _encode(finish))
            parts += (b',"stop_reason":', _encode(stop_reason), more, b"}]")
        parts += (usage, b"}\n\n")
        return b"".join(parts)

    def usage(self, usage: bytes) -> bytes:
        """The chunk after the last choice ended."""
        return self._head + b"]" + usage + b"}\n\n"


class EventStream(Response):
    """Server-sent events as a source writes them.

    Begins with the first piece: an error before it is raised, one after it becomes the last event.
    Who waits long for a piece is told that there is work on it.

    The task of the request is woken for the beginning and the end. Between them pieces go straight
    to the connection, in the loop's next turn, so that what one message of the engine brings to
    many streams is all rendered before the first of their clients wakes.

    `source` writes here and returns the last piece; `close` is called once, at the end.
    """

    def __init__(self, source: Source, close: Callable[[], None], ending: StreamEnd) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"content-type": "text/event-stream; charset=utf-8"})
        # Proxies must pass events on at once.
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._source = source
        self._close = close
        self._ending = ending
        self._pieces: list[bytes] = []  # not sent yet
        self._awake = asyncio.Event()  # the task has something to do
        self._connection: HttpProtocol | None = None  # once the response has begun
        self._begun = False
        self._wrote = True  # lately
        self.full = False  # the client does not read: what is written piles up
        self.on_full: Callable[[bool], None] = lambda full: None  # told when that changes

    def write(self, piece: bytes) -> None:
        """Add a piece. Never waits: who may write much heeds `full`."""
        self._wrote = True
        self._pieces.append(piece)
        if self._connection is None:
            self._awake.set()
        elif len(self._pieces) == 1:
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        if self._connection is not None and (body := self._taken()):  # an empty one would end it
            self._connection.write_chunk(body)

    def _taken(self) -> bytes:
        taken = b"".join(self._pieces)
        self._pieces.clear()
        return taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: HttpProtocol | None = scope.get("state", {}).get("connection")
        source = asyncio.create_task(self._source(self))
        source.add_done_callback(lambda _: self._awake.set())
        self._keep_alive()
        try:
            try:
                await self._pass_on(source, connection, send)
                last = source.result() + self._ending.done
            except (ApiError, EngineDeadError, ClientDisconnect, asyncio.CancelledError) as error:
                if not self._begun and (not self._pieces or isinstance(error, ClientDisconnect)):
                    raise
                if isinstance(error, ClientDisconnect):
                    return
                last = self._ending.failed(with_request_id(_told(error), scope))
            await self._send(send, self._taken() + last, more=False)
        except asyncio.CancelledError:
            if not self._begun:
                raise
            # Not read in the time that there is to shut down.
        finally:
            self._timer.cancel()
            if connection is not None:
                connection.on_pause = None
            self._close()
            if not source.done():
                source.cancel()
                await asyncio.wait({source})

    async def _pass_on(
        self, source: asyncio.Task[bytes], connection: HttpProtocol | None, send: Send
    ) -> None:
        """Begin the response, and wait until the source has ended.

        Without a connection of ours, as in tests, all pieces go this way.
        """
        if connection is not None:
            connection.on_pause = self._set_full
        while not source.done():
            await self._awake.wait()
            self._awake.clear()
            if self._pieces and not source.done():
                self._set_full(True)
                await self._send(send, self._taken())
                self._connection = connection
                self._set_full(connection is not None and connection.paused)

    async def _send(self, send: Send, piece: bytes, *, more: bool = True) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": piece, "more_body": more})

    def _set_full(self, full: bool) -> None:
        self.full = full
        self.on_full(full)

    def _keep_alive(self) -> None:
        """Say something if nothing was written since the last call."""
        if not self._wrote and not self.full:
            self.write(KEEP_ALIVE)
        self._wrote = False
        self._timer = asyncio.get_running_loop().call_later(KEEP_ALIVE_SECONDS, self._keep_alive)


Source = Callable[[EventStream], Coroutine[Any, Any, bytes]]


def _told(error: ApiError | EngineDeadError | asyncio.CancelledError) -> ApiError:
    """What the client hears of it."""
    if isinstance(error, EngineDeadError):
        return engine_dead(error)
    return error if isinstance(error, ApiError) else shutting_down()
