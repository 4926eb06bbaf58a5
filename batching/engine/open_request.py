"""What the front end remembers of an open request, so that another engine can continue it."""

from __future__ import annotations

import msgspec

from batching.core.types import Request, TokenEvent
from batching.engine.stream import RequestStream


class OpenRequest:
    """A request without its last event: its stream, what the stream was told, where it stands.

    Sampling depends on prompt, generated tokens and seed alone, so an engine that is given these
    continues exactly. Tokens that died on the way are made again; what an engine says anew about
    the beginning (cache hits, prompt logprobs) the stream must not hear twice.
    """

    __slots__ = (
        "_heard", "_repeats", "_request", "_scored", "admitted", "crashes", "deaths",
        "gained", "generated", "interrupted", "sent", "stream",
    )  # fmt: skip

    def __init__(self, stream: RequestStream) -> None:
        self.stream = stream
        self.generated = list(stream.request.generated)
        self.sent = False  # the present engine has it
        self.admitted = False  # and computed, or was about to compute, some of it
        self.gained = 0  # tokens that the present engine generated
        self.interrupted = False  # an engine died with it
        self.deaths: dict[float, int] = {}  # in a row, that it may have caused (see `quarantine`)
        self.crashes: set[float] = set()  # when engines failed by themselves while computing it
        self._request = stream.request
        self._heard = False  # the first event, with the number of cached tokens, was delivered
        self._scored = 0  # prompt logprobs delivered
        self._repeats = 0  # of these, those that the present engine will send again

    @property
    def id(self) -> str:
        return self._request.id

    def take(self, event: TokenEvent) -> TokenEvent:
        """Note an event; returns what of it is news."""
        if self.interrupted:
            event = self._without_repeats(event)
        self.generated += event.tokens
        self.gained += len(event.tokens)
        self._scored += len(event.prompt_logprobs)
        self._heard = self._heard or event.cached_tokens is not None
        return event

    def interrupt(self) -> None:
        """The engine died: the next one starts from what was delivered."""
        self.interrupted = self.interrupted or self.sent
        self.sent = self.admitted = False
        self.gained = 0

    def to_send(self) -> Request:
        """The request as the next engine needs it, marked as sent."""
        self.sent = True
        if not self.interrupted:
            return self._request
        params = self._request.params
        if self._scored == len(self._request.prompt) - 1:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        self._repeats = self._scored if params.prompt_logprobs is not None else 0
        return msgspec.structs.replace(self._request, params=params, generated=self.generated)

    def _without_repeats(self, event: TokenEvent) -> TokenEvent:
        repeats = min(self._repeats, len(event.prompt_logprobs))
        self._repeats -= repeats
        return msgspec.structs.replace(
            event,
            prompt_logprobs=event.prompt_logprobs[repeats:],
            cached_tokens=None if self._heard else event.cached_tokens,
        )
