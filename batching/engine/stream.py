"""One request's events as its reader sees them, and the ways they can end in an error."""

from __future__ import annotations

from collections.abc import Callable

from batching.core.types import FinishReason, Request, TokenEvent


class EngineStartError(RuntimeError):
    """The engine could not start; the message is fit for a user's eyes."""


class EngineDeadError(RuntimeError):
    """There is no engine, and none will be started again."""


class RequestStream:
    """One request's events, in one slot.

    Until the reader takes them events merge (tokens and logprobs are concatenated), so that a
    stream holds at most one event and never delays another. `on_news`, which the reader sets, is
    called when there is something to take. No task is woken for it; it must not raise.
    """

    def __init__(self, request: Request, abort: Callable[[str], None]) -> None:
        self.request = request
        self.on_news: Callable[[], None] = lambda: None
        self._abort = abort
        self._pending: TokenEvent | None = None
        self._finished = False  # the last event was pushed
        self._error: Exception | None = None

    def take(self) -> TokenEvent | None:
        """What came since the last call; the last has `finish` set. Raises `EngineDeadError`.

        After an event there may be an error: take until there is nothing.
        """
        event, self._pending = self._pending, None
        if event is None and self._error is not None:
            raise self._error
        return event

    def cancel(self, reason: FinishReason = FinishReason.ABORT) -> None:
        """Abort the request and end the stream. Idempotent; harmless after the end."""
        if not self._finished:
            self.push(TokenEvent(self.request.id, finish=reason))
            self._abort(self.request.id)

    def push(self, event: TokenEvent) -> None:
        """Add an event and tell the reader (the client's side)."""
        self.add(event)
        self.on_news()

    def add(self, event: TokenEvent) -> None:
        """Add an event; who does so must call `on_news` soon (the client's side)."""
        self._pending = event if self._pending is None else _merge(self._pending, event)
        if event.finish is not None:
            self._finished = True

    def fail(self, error: Exception) -> None:
        """End the stream with an error (the client's side)."""
        self._error = error
        self._finished = True
        self.on_news()


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
