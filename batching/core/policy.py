"""Who is served first: order keys as pure functions, and the queue of those who wait."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from operator import attrgetter

from batching.core.sequence import Sequence
from batching.core.types import Request

# Ageing makes every order finite: a request is overtaken only by those that arrive this soon
# after it, so a stream of favoured requests cannot starve the rest.
PRIORITY_STEP_SECONDS = 30.0  # head start of one priority level
NO_DEADLINE_SECONDS = 300.0  # a request without a deadline ranks as if it had this one

_MAX_IDLE_TENANTS = 1024


def fcfs(request: Request) -> float:
    """First come, first served."""
    return request.arrival


def priority(request: Request) -> float:
    """Lower `priority` first, then arrival; a level is worth `PRIORITY_STEP_SECONDS`."""
    return request.arrival + request.priority * PRIORITY_STEP_SECONDS


def deadline(request: Request) -> float:
    """Earliest deadline first; those without one last, within `NO_DEADLINE_SECONDS`."""
    if request.deadline is not None:
        return request.deadline
    return request.arrival + NO_DEADLINE_SECONDS


# "fair" orders by arrival within a tenant; between tenants the queue's counters decide.
POLICIES: dict[str, Callable[[Request], float]] = {
    "fcfs": fcfs,
    "priority": priority,
    "deadline": deadline,
    "fair": fcfs,
}

Rank = tuple[float, tuple[float, int]]
_key = attrgetter("key")


class WaitingQueue:
    """Waiting sequences in policy order.

    Under "fair", tenants share tokens by a virtual token counter each (Sheng et al., "Fairness in
    Serving Large Language Models", OSDI 2024): the tenant served least goes first, and a tenant
    that becomes active is lifted to the least of the active, so that idling saves up no credit.
    Other policies are the case of a single tenant.
    """

    def __init__(self, policy: str) -> None:
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
        self.order = POLICIES[policy]
        self.is_fair = policy == "fair"
        self._queues: dict[str, list[Sequence]] = {}  # only non-empty ones
        self._served: dict[str, int] = {}
        self._active: dict[str, int] = {}  # unfinished requests by tenant
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def join(self, sequence: Sequence) -> None:
        """Count a new request of its tenant as active, and queue it."""
        tenant = self._tenant(sequence)
        if tenant not in self._active:
            least = min((self._served[t] for t in self._active), default=0)
            self._served[tenant] = max(self._served.get(tenant, 0), least)
            self._active[tenant] = 0
            if len(self._served) > len(self._active) + _MAX_IDLE_TENANTS:
                self._forget_idle(least)
        self._active[tenant] += 1
        self.push(sequence)

    def leave(self, sequence: Sequence) -> None:
        """The request has ended."""
        tenant = self._tenant(sequence)
        self._active[tenant] -= 1
        if self._active[tenant] == 0:
            del self._active[tenant]

    def push(self, sequence: Sequence) -> None:
        """Queue a sequence, in its place: a preempted one comes before its successors."""
        insort(self._queues.setdefault(self._tenant(sequence), []), sequence, key=_key)
        self._size += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a queued sequence out. Raises KeyError if it is not queued."""
        tenant = self._tenant(sequence)
        queue = self._queues[tenant]
        place = bisect_left(queue, sequence.key, key=_key)
        if place == len(queue) or queue[place] is not sequence:
            raise KeyError(sequence.id)
        del queue[place]
        if not queue:
            del self._queues[tenant]
        self._size -= 1

    def head(self) -> Sequence | None:
        """The sequence to admit next."""
        if not self._queues:
            return None
        return min((queue[0] for queue in self._queues.values()), key=self.rank)

    def rank(self, sequence: Sequence) -> Rank:
        """Orders any sequences, waiting or not: lower is served first."""
        return self._served[self._tenant(sequence)], sequence.key

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """Count tokens served to the sequence's tenant."""
        if self.is_fair:
            self._served[sequence.request.tenant] += tokens

    def _tenant(self, sequence: Sequence) -> str:
        return sequence.request.tenant if self.is_fair else ""

    def _forget_idle(self, least: int) -> None:
        """Drop counters that the next lift would overwrite anyway, and more if that is not enough.

        Half as many as may be are kept, so that it is seldom done: those of the largest debts.
        """
        idle = [(n, t) for t, n in self._served.items() if t not in self._active and n > least]
        kept = {tenant for _, tenant in sorted(idle)[-_MAX_IDLE_TENANTS // 2 :]}
        self._served = {t: n for t, n in self._served.items() if t in self._active or t in kept}
