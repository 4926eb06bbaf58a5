"""Server-sent events: pre-rendered envelopes, and the response that writes them.

The part of a chunk that never changes is rendered once per choice; a token costs one JSON string
and one join. Nothing here builds a model or a dict per token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.http.errors import ApiError, engine_dead, with_request_id
from batching.engine.client import EngineDeadError

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
    """Writes byte pieces as they come. Begins with the first: an error before it is raised, one
    after it becomes the last event. Who waits long for a piece is told that there is work on it.

    `close` is called once, at the end.
    """

    def __init__(
        self, pieces: AsyncGenerator[bytes], close: Callable[[], None], ending: StreamEnd
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"content-type": "text/event-stream; charset=utf-8"})
        # Proxies must pass events on at once.
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._pieces = pieces
        self._close = close
        self._ending = ending
        self._sent = 0
        self._sending = False
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        waker = asyncio.create_task(self._keep_alive(send))
        try:
            try:
                async for piece in self._pieces:
                    self._sending = True
                    await self._write(send, piece)
                    self._sending = False
                last = self._ending.done
            except (ApiError, EngineDeadError, ClientDisconnect) as error:
                if not self._begun:
                    raise
                if isinstance(error, ClientDisconnect):
                    return
                known = engine_dead(error) if isinstance(error, EngineDeadError) else error
                last = self._ending.failed(with_request_id(known, scope))
            finally:
                waker.cancel()
            await self._write(send, last, more=False)
        except asyncio.CancelledError:
            if not self._begun:
                raise
            # Not read in the time that there is to shut down.
        finally:
            try:
                await self._pieces.aclose()
            finally:
                self._close()

    async def _write(self, send: Send, piece: bytes, *, more: bool = True) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": piece, "more_body": more})
        self._sent += 1

    async def _keep_alive(self, send: Send) -> None:
        while True:
            before = self._sent
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            if self._sent == before and not self._sending:
                await self._write(send, KEEP_ALIVE)
