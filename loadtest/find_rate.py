"""The highest request rate that keeps the promises: double until one is broken, then bisect."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

_CLOSE = 1.05  # the two sides of the bracket are this near in the end
_MOST_PROBES = 16
_LOWEST = 1 / 64  # of the first rate: below, the promise cannot be kept at any rate

Probe = Callable[[float], Awaitable[tuple[bool, dict[str, Any]]]]


async def find_rate(probe: Probe, first: float) -> dict[str, Any]:
    """`probe(rate)` runs at a rate and says whether it was good, and its figures.

    Returns the highest `rate` found good (None if not even the lowest was), the lowest found bad,
    and all probes in order of rate, for the curve of latency against rate.
    """
    good: float | None = None
    bad: float | None = None
    probes: dict[float, dict[str, Any]] = {}
    rate = first
    for _ in range(_MOST_PROBES):
        met, figures = await probe(rate)
        probes[rate] = {"rate": rate, "met": met, **figures}
        if met:
            good = rate
        else:
            bad = rate
        if bad is None:
            rate *= 2
        elif good is None:
            rate /= 2
            if rate < first * _LOWEST:
                break
        elif bad / good <= _CLOSE:
            break
        else:
            rate = (good * bad) ** 0.5
    return {"rate": good, "too_high": bad, "probes": [probes[r] for r in sorted(probes)]}
