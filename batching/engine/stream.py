"""One request's events as its reader sees them, and the ways they can end in an error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from batching.core.types import FinishReason, Request, TokenEvent


class EngineStartError(RuntimeError):
    """The engine could not start; the message is fit for a user's eyes."""


class EngineDeadError(RuntimeError):
    """There is no engine, and none will be started again."""


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

    def cancel(self, reason: FinishReason = FinishReason.ABORT) -> None:
        """Abort the request and end the stream. Idempotent; harmless after the end."""
        if not self._finished:
            self.push(TokenEvent(self.request.id, finish=reason))
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
    )
