"""Who waits for a first token, and when the next one to come would have its own."""

from __future__ import annotations

from collections.abc import Sequence

from app.engine_protocol import Engine
from batching.core.forecast import Ahead, Room, ahead_of, first_token_seconds
from batching.core.types import Request
from batching.worker.protocol import Capabilities


class Backlog:
    """The requests of one engine that have no first token yet."""

    def __init__(self, engine: Engine, capabilities: Capabilities, policy: str) -> None:
        self._engine = engine
        self._room = Room(capabilities.max_sequences, capabilities.max_step_tokens)
        self._policy = policy
        self._waiting: dict[str, Request] = {}
        self._tokens = 0

    @property
    def is_idle(self) -> bool:
        """Nothing waits and nothing runs, as far as the engine has said."""
        return not self._waiting and not self._engine.stats.running

    def join(self, request: Request) -> None:
        """It was handed to the engine."""
        self._waiting[request.id] = request
        self._tokens += len(request.prompt)

    def leave(self, request: Request) -> None:
        """It got its first token, or will never. Idempotent."""
        if self._waiting.pop(request.id, None) is not None:
            self._tokens -= len(request.prompt)

    def ahead_of(self, request: Request) -> Ahead:
        """Those that will have their first tokens before `request`, submitted now."""
        if self._policy == "fcfs" or not self._waiting:
            return Ahead(len(self._waiting), self._tokens)
        return ahead_of(request, self._waiting.values(), self._policy)

    def first_token_seconds(
        self, ahead: Ahead, requests: Sequence[Request], samples: int
    ) -> float | None:
        """Seconds until all of `requests`, submitted now, would have their first tokens.

        Each group of `samples` shares its prompt, which is computed once. None: the engine has
        computed too little for a forecast.
        """
        tokens = sum(len(request.prompt) for request in requests[::samples])
        ahead = Ahead(ahead.requests + len(requests) - 1, ahead.tokens)
        return first_token_seconds(tokens, ahead, self._engine.stats, self._room)

    def drain_seconds(self) -> float | None:
        """Seconds until all that waits now would have been taken up. None as above."""
        if not self._waiting:
            return 0.0
        everything = Ahead(len(self._waiting), self._tokens)
        return first_token_seconds(0, everything, self._engine.stats, self._room)
