"""Finds the request that crashes the engine, so that it is failed alone.

An engine that dies proves nothing: somebody may have killed it. A request is *accused* if the
engine was computing it when it died, and had not generated `PROVEN_TOKENS` tokens for it before:
what crashes an engine does so again at the same place, hence soon after it was resumed. Accused
twice in a row (or four times, if the engine was killed) it is a suspect. Suspects go to the next
engine one at a time, and nobody else with them, until they have proven themselves, which takes a
few steps each:

    crash 1  {a b P}   one strike; all are resumed
    crash 2  {a b P}   two strikes; suspects a, b, P
             {a}       a generates 8 tokens: proven
             {a b}     b too
    crash 3  {a b P}   P is the only one accused: it fails, everybody else is resumed

To be the only one accused, twice even, may be chance if others were there; on trial it is guilt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

# More than a prefill and a few decode steps, so that a fault in any kind of step shows.
PROVEN_TOKENS = 8
_STRIKE = 2
_KILLED_STRIKE = 1  # half the evidence: somebody from outside, or the kernel for want of memory
_SUSPECT_STRIKES = 2 * _STRIKE


class Accusable(Protocol):
    """What must be known of an open request to judge it."""

    sent: bool  # the present engine has it
    admitted: bool  # and computed, or was about to compute, some of it
    gained: int  # tokens that the present engine generated
    deaths: dict[float, int]  # in a row, that it may have caused: when, and how many strikes each
    crashes: set[float]  # when engines failed by themselves while they computed it

    @property
    def id(self) -> str: ...


Open = TypeVar("Open", bound=Accusable)


class Quarantine(Generic[Open]):
    """Accuses, tries and acquits requests. Knows neither the engine nor the time.

    A text to embed has no tokens to prove itself with: it is acquitted by its end.
    """

    def __init__(self) -> None:
        self._suspects: dict[str, Open] = {}  # the first is, or will next be, on trial

    def engine_died(self, sent: Sequence[Open], killed: bool, when: float) -> Open | None:
        """Who of the requests `sent` to the dead engine is guilty of its death, if anybody.

        `killed`: the engine did not fail by itself, a SIGKILL ended it. Whoever is guilty is so of
        all its `deaths`.
        """
        unproven = []
        for request in sent:
            if _proven(request):
                request.deaths.clear()
            else:
                unproven.append(request)
            if request.admitted and not killed:
                request.crashes.add(when)
        # If none was computed, planning or taking in a request may have failed.
        accused = [request for request in unproven if request.admitted] or unproven
        tried = len(sent) == 1 or accused[:1] == list(self._suspects.values())[:1]
        for request in accused:
            request.deaths[when] = _KILLED_STRIKE if killed else _STRIKE
            if sum(request.deaths.values()) >= _SUSPECT_STRIKES:
                self._suspects[request.id] = request
        if len(accused) == 1 and tried and accused[0].id in self._suspects:
            return self._suspects.pop(accused[0].id)
        return None

    def may_go(self, waiting: Sequence[Open]) -> Sequence[Open]:
        """Which of the requests that no engine has may be sent to one now."""
        if not self._suspects:
            return waiting
        first = next(iter(self._suspects.values()))
        return () if first.sent else (first,)

    def acquit(self, request: Open) -> bool:
        """Drop the suspicion if the request is proven. Returns whether a trial has ended."""
        return _proven(request) and self.forget(request)

    def forget(self, request: Open) -> bool:
        """The request has ended. Returns whether that ends a trial."""
        return self._suspects.pop(request.id, None) is not None


def _proven(request: Accusable) -> bool:
    """Whether the engine served it long enough; longer each time that did not keep it alive."""
    return request.gained >= PROVEN_TOKENS << max(0, len(request.crashes) - 2)
