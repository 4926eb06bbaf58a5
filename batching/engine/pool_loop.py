"""The pooling engine's one loop: inbox, batch, compute, outbox."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from batching.core.pool_queue import BatchSize, PoolQueue
from batching.core.types import EngineStats, PoolRequest, PoolResult
from batching.engine.messages import FromEngine, PoolOutput, PoolSubmit, Starting
from batching.worker.pool_protocol import PoolWorker

HEARTBEAT_SECONDS = 1.0


class PoolLoop:
    """Drives one queue and one worker. Single-threaded; owns neither clock nor transport.

    `receive(timeout)` returns the messages that arrived, waiting up to `timeout` seconds for the
    first; `send` hands a message to the front end.
    """

    def __init__(
        self,
        worker: PoolWorker,
        receive: Callable[[float], list[PoolSubmit]],
        send: Callable[[FromEngine], None],
        *,
        size: BatchSize,
        max_requests: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._receive = receive
        self._send = send
        self._size = size
        self._max_requests = max_requests
        self._clock = clock
        self._queue = PoolQueue()
        self._stats = EngineStats()
        self._longest = 0  # tokens of a batch so far

    def run_forever(self) -> None:
        """Serve until `receive` or the worker raises."""
        while True:
            self.run_once()

    def run_once(self) -> None:
        """Take in what arrived, compute one batch, and report it. Idle: a heartbeat."""
        for submit in self._inbox():
            for request in submit.requests:
                self._queue.add(request)
            for request_id in submit.aborts:
                self._queue.abort(request_id)
        batch = self._queue.take(self._size.tokens, self._max_requests)
        results = self._compute(batch) if batch else []
        self._send(PoolOutput(results, self._stats))

    def _inbox(self) -> list[PoolSubmit]:
        """What arrived; with nothing to compute, wait for it."""
        if self._queue:
            return self._receive(0.0)
        began = self._clock()
        submits = self._receive(HEARTBEAT_SECONDS)
        idle = self._stats.idle_seconds + self._clock() - began
        self._stats = msgspec.structs.replace(self._stats, idle_seconds=idle)
        return submits

    def _compute(self, batch: Sequence[PoolRequest]) -> list[PoolResult]:
        began = self._clock()
        tokens = sum(len(request.tokens) for request in batch)
        self._announce(batch, tokens)
        rows = self._worker.run(batch)
        now = self._clock()
        self._size.ran(tokens, now - began)
        stats = self._stats
        self._stats = msgspec.structs.replace(
            stats,
            steps=stats.steps + 1,
            step_tokens=tokens,
            step_seconds=now - began,
            forward_seconds=stats.forward_seconds + now - began,
            prompt_tokens=stats.prompt_tokens + tokens,
        )
        return [
            PoolResult(request.id, row, began, now)
            for request, row in zip(batch, rows, strict=True)
        ]

    def _announce(self, batch: Sequence[PoolRequest], tokens: int) -> None:
        """Say what the supervisor must know if this batch never ends, and what runs now."""
        familiar = tokens <= self._longest
        self._longest = max(self._longest, tokens)
        ids = [request.id for request in batch]
        self._send(Starting(self._stats.steps, self._size.forecast(tokens), familiar, ids))
