"""Which of the waiting texts form the next batch: calls take turns by the tokens they were given.

There is no waiting for a batch to fill: whatever arrived while the last one ran is there to be
taken. A call with thousands of texts shares the batches with those that come later, so that a
single text is served in the next batch or the one after.
"""

from __future__ import annotations

import heapq

from batching.core.types import PoolRequest


class _Call:
    """Waiting texts of one call, oldest first, and how far it is served."""

    __slots__ = ("requests", "served")

    def __init__(self, served: float) -> None:
        self.requests: dict[str, PoolRequest] = {}
        self.served = served


class PoolQueue:
    """Fair queueing over calls (start-time fair queueing, Goyal et al. 1996; cost is tokens)."""

    def __init__(self) -> None:
        self._calls: dict[str, _Call] = {}
        self._call_of: dict[str, str] = {}  # request id to its call
        self._turns: list[tuple[float, int, str]] = []  # heap; stale entries are skipped
        self._turn = 0  # breaks ties by age
        self._virtual = 0.0  # a call that comes now counts as served this far

    def __len__(self) -> int:
        """Texts that wait."""
        return len(self._call_of)

    def add(self, request: PoolRequest) -> None:
        """Raises `ValueError` for an id that waits already."""
        if request.id in self._call_of:
            raise ValueError(f"request {request.id} waits already")
        self._call_of[request.id] = request.call
        call = self._calls.get(request.call)
        if call is None:
            call = self._calls[request.call] = _Call(self._virtual)
            self._queue_turn(request.call, call)
        call.requests[request.id] = request

    def abort(self, request_id: str) -> bool:
        """Forget a waiting text. Returns whether there was one."""
        name = self._call_of.pop(request_id, None)
        if name is None:
            return False
        call = self._calls[name]
        del call.requests[request_id]
        if not call.requests:
            del self._calls[name]
        return True

    def take(self, max_tokens: int, max_requests: int) -> list[PoolRequest]:
        """The next batch, removed from the queue; empty only if nothing waits.

        It keeps within `max_tokens`, but for a first text that alone is longer.
        """
        batch: list[PoolRequest] = []
        room = max_tokens
        while len(batch) < max_requests and (name := self._next_call()) is not None:
            call = self._calls[name]
            request = next(iter(call.requests.values()))
            if batch and len(request.tokens) > room:
                break
            heapq.heappop(self._turns)
            self._virtual = call.served
            call.served += len(request.tokens)
            room -= len(request.tokens)
            batch.append(request)
            self.abort(request.id)
            if call.requests:
                self._queue_turn(name, call)
        return batch

    def _queue_turn(self, name: str, call: _Call) -> None:
        self._turn += 1
        heapq.heappush(self._turns, (call.served, self._turn, name))

    def _next_call(self) -> str | None:
        """The call that was served least. Drops the turns of calls that are gone."""
        while self._turns:
            served, _, name = self._turns[0]
            call = self._calls.get(name)
            if call is not None and call.served == served:
                return name
            heapq.heappop(self._turns)
        return None


class BatchSize:
    """How many tokens a batch may have so that it takes about `target` seconds.

    Learns tokens per second from the batches that ran, slowly, since single ones are noisy.
    """

    _SHARE = 0.2  # of the newest batch in the estimate
    _SMALLEST = 64  # tokens; below this, overhead is most of the time

    def __init__(self, target: float, most: int) -> None:
        self._target = target
        self._most = most
        self.rate: float | None = None  # tokens per second

    @property
    def tokens(self) -> int:
        """Most tokens of the next batch."""
        if self.rate is None:
            return self._most
        return min(max(int(self.rate * self._target), self._SMALLEST), self._most)

    def ran(self, tokens: int, seconds: float) -> None:
        """Learn from a batch; small ones say nothing about the rate of large ones."""
        if seconds <= 0 or tokens < min(self.tokens // 2, self._most // 2):
            return
        rate = tokens / seconds
        self.rate = rate if self.rate is None else self.rate + self._SHARE * (rate - self.rate)

    def forecast(self, tokens: int) -> float:
        """Seconds a batch of so many tokens should take; 0 while nothing is known."""
        return tokens / self.rate if self.rate else 0.0
