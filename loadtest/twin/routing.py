"""Which replica gets a request: small policies that see the replicas and the request's prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from loadtest.twin.replica import Replica

_BLOCK = 128  # tokens of a prompt that are looked up at once
_REMEMBERED = 100_000  # beginnings of prompts, over all replicas
_IMBALANCE = 1.5  # a replica with more load than so many times the mean is not chosen for its cache


class Router(Protocol):
    """Chooses a replica, and may remember that it did."""

    def choose(self, prompt: list[int], replicas: Sequence[Replica]) -> int: ...


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._next = -1

    def choose(self, prompt: list[int], replicas: Sequence[Replica]) -> int:
        self._next = (self._next + 1) % len(replicas)
        return self._next


class LeastLoaded:
    """The fewest tokens of unfinished requests; the first of equals."""

    def choose(self, prompt: list[int], replicas: Sequence[Replica]) -> int:
        return min(range(len(replicas)), key=lambda i: replicas[i].queued_tokens)


class PrefixAware:
    """The replica that saw the longest beginning of the prompt, unless it is overloaded; else the
    least loaded. It remembers the beginnings that it routed, the least recently used go first."""

    def __init__(self) -> None:
        self._seen: OrderedDict[int, int] = OrderedDict()  # hash of a beginning to its replica
        self._fallback = LeastLoaded()

    def choose(self, prompt: list[int], replicas: Sequence[Replica]) -> int:
        keys = _beginnings(prompt)
        limit = _IMBALANCE * sum(r.queued_tokens for r in replicas) / len(replicas) + len(prompt)
        chosen = None
        for key in reversed(keys):
            place = self._seen.get(key)
            if place is not None and replicas[place].queued_tokens <= limit:
                chosen = place
                break
        if chosen is None:
            chosen = self._fallback.choose(prompt, replicas)
        for key in keys:
            self._seen[key] = chosen
            self._seen.move_to_end(key)
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return chosen


def _beginnings(prompt: list[int]) -> list[int]:
    """Hashes (of numbers, so equal in every process) of the prompt's first blocks, chained."""
    keys, key = [], 0
    for start in range(0, len(prompt) - _BLOCK + 1, _BLOCK):
        key = hash((key, *prompt[start : start + _BLOCK]))
        keys.append(key)
    return keys


ROUTERS: dict[str, type[Router]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "prefix-aware": PrefixAware,
}
