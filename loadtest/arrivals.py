"""When requests are sent. Offsets are seconds from the start of the run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """`count` arrivals of a Poisson process with `rate` requests per second, in order.

    Gaps are independent and exponential with mean 1/rate, so bursts happen as with many
    independent users. Equal seeds give equal times.
    """
    return list(islice(_poisson(rate, random.Random(seed)), count))


def _poisson(rate: float, source: random.Random) -> Iterator[float]:
    now = 0.0
    while True:
        now += source.expovariate(rate)
        yield now
