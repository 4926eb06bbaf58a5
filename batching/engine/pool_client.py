"""The front end's asyncio handle on a pooling engine: texts in, rows of numbers out.

A call's texts are computed in whatever batches they fit; the call ends with the last of them. When
the engine dies, texts without a result go to the next one (see `supervised`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from batching.core.types import PoolRequest, PoolResult
from batching.engine.messages import FromEngine, PoolOutput, PoolSubmit
from batching.engine.stream import EngineDeadError
from batching.engine.supervised import SupervisedClient
from batching.worker.pool_protocol import PoolCapabilities
from config.settings import EngineSettings


class PoolError(RuntimeError):
    """The engine could not compute a text that was valid."""


class PoolCall:
    """The texts of one API call: await `results`, or `cancel`."""

    def __init__(self, requests: Sequence[PoolRequest], abort: Callable[[str], None]) -> None:
        self.requests = requests
        self._abort = abort
        self._results: dict[str, PoolResult] = {}
        self._dropped = False
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def results(self) -> list[PoolResult]:
        """One result a request, in order. Raises `PoolError` and `EngineDeadError`.

        After `cancel` it raises `CancelledError`.
        """
        await self._done
        return [self._results[request.id] for request in self.requests]

    def cancel(self) -> None:
        """Drop what is not computed yet. Idempotent; harmless after the end."""
        self._done.cancel()  # may be so already: a reader that is cancelled cancels it
        self._drop()

    def finish(self, result: PoolResult) -> None:
        """A text was computed (the client's side)."""
        self._results[result.id] = result
        if len(self._results) == len(self.requests) and not self._done.done():
            self._done.set_result(None)

    def fail(self, error: Exception) -> None:
        """A text cannot be computed, hence neither can the call (the client's side)."""
        if not self._done.done():
            self._done.set_exception(error)
            self._drop()

    def _drop(self) -> None:
        if self._dropped:
            return
        self._dropped = True
        for request in self.requests:
            if request.id not in self._results:
                self._abort(request.id)


class OpenText:
    """A text without its result. It is computed whole or not at all, so it gains no tokens."""

    __slots__ = ("admitted", "call", "crashes", "deaths", "gained", "interrupted", "request",
                 "sent")  # fmt: skip

    def __init__(self, request: PoolRequest, call: PoolCall) -> None:
        self.request = request
        self.call = call
        self.sent = self.admitted = self.interrupted = False
        self.gained = 0
        self.deaths: dict[float, int] = {}
        self.crashes: set[float] = set()

    @property
    def id(self) -> str:
        return self.request.id

    def interrupt(self) -> None:
        """The engine died: the next one gets the text again."""
        self.interrupted = self.interrupted or self.sent
        self.sent = self.admitted = False


OnBatch = Callable[[Sequence[tuple[PoolRequest, PoolResult]], int], None]


class PoolClient(SupervisedClient[OpenText, PoolCapabilities]):
    """Keeps one pooling engine running and talks to it.

    `on_batch` is called with the texts of each batch that were still waited for, their results,
    and the tokens of the whole batch.
    """

    def __init__(
        self,
        settings: EngineSettings,
        on_batch: OnBatch | None = None,
        *,
        child_module: str = "batching.engine.pool_child",
    ) -> None:
        super().__init__(settings, child_module)
        self.on_batch = on_batch

    def submit(self, requests: Sequence[PoolRequest]) -> PoolCall:
        """Queue texts with ids of their own. Raises `EngineDeadError` if there is no engine."""
        call = PoolCall(requests, self.abort)
        for request in requests:
            self._take_up(OpenText(request, call))
        return call

    def counts(self) -> tuple[int, int]:
        """Texts that are computed now, and texts that wait."""
        running = sum(text.admitted for text in self._open.values())
        return running, len(self._open) - running

    def _message(self, requests: list[OpenText], aborts: list[str]) -> PoolSubmit:
        for request in requests:
            request.sent = True
        return PoolSubmit([request.request for request in requests], aborts)

    def _deliver(self, message: FromEngine) -> None:
        if not isinstance(message, PoolOutput):
            return
        self.stats = self._sum_totals(message.stats)
        texts = []
        for result in message.results:
            text = self._open.get(result.id)
            if text is not None:  # else aborted meanwhile
                self._forget(text)
                text.call.finish(result)
                texts.append((text.request, result))
        if message.results and self.on_batch is not None:
            self.on_batch(texts, message.stats.step_tokens)

    def _condemn(self, request: OpenText, error: str) -> None:
        request.call.fail(PoolError(error))

    def _abandon(self, request: OpenText, error: EngineDeadError) -> None:
        request.call.fail(error)
