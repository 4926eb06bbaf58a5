"""When requests are sent. Offsets are seconds from the start of the run.

Two independent choices. *Gaps* say how regular arrivals are: constant, Poisson, or gamma with any
coefficient of variation. A *shape* says how the rate changes: steady, step, ramp or diurnal.
Arrivals with unit rate are drawn from the gaps and stretched by the inverse of the shape's
expected count, so every combination is exact. Equal seeds give equal times.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Gaps = Literal["constant", "poisson", "gamma"]
When = Callable[[float], float]  # expected count so far to seconds


@dataclass(frozen=True)
class Arrivals:
    """A seeded arrival process of `rate` requests per second.

    `shape` is `steady`, `step:RATE@SECONDS` (another rate from then on), `ramp:RATE@SECONDS`
    (linear until then, steady after) or `diurnal:SWING@SECONDS` (a sine of that period around
    `rate`, from (1 - SWING) to (1 + SWING) times it, beginning at its low). `cv` is the coefficient
    of variation of gamma gaps: 1 is Poisson, more is burstier.

    Raises `ValueError` for numbers that make no process.
    """

    rate: float
    gaps: Gaps = "poisson"
    cv: float = 1.0
    shape: str = "steady"

    def __post_init__(self) -> None:
        if not self.rate > 0 or not self.cv > 0:
            raise ValueError("the rate and the variation of gaps must be above 0")
        self._when()

    def times(self, count: int, seed: int) -> list[float]:
        """The first `count` arrivals, in order."""
        draw, when = self._gap(random.Random(seed)), self._when()
        now = 0.0
        times = []
        for _ in range(count):
            now += draw()
            times.append(when(now))
        return times

    def _gap(self, source: random.Random) -> Callable[[], float]:
        """Gaps of mean 1."""
        if self.gaps == "constant":
            return lambda: 1.0
        if self.gaps == "poisson":
            return lambda: source.expovariate(1.0)
        size = self.cv**-2
        return lambda: source.gammavariate(size, 1 / size)

    def _when(self) -> When:
        kind, _, rest = self.shape.partition(":")
        if kind == "steady" and not rest:
            return lambda count: count / self.rate
        shapes = {"step": _step, "ramp": _ramp, "diurnal": _diurnal}
        try:
            first, second = (float(part) for part in rest.split("@"))
        except ValueError:
            first = second = math.nan
        if kind not in shapes or not (first > 0 and second > 0):
            raise ValueError(
                f"{self.shape!r} is no shape: steady, step:RATE@SECONDS, ramp:RATE@SECONDS, "
                "diurnal:SWING@SECONDS"
            )
        return shapes[kind](self.rate, first, second)


def _step(rate: float, later: float, at: float) -> When:
    before = rate * at
    return lambda n: n / rate if n <= before else at + (n - before) / later


def _ramp(rate: float, later: float, until: float) -> When:
    slope = (later - rate) / until
    ramped = (rate + later) / 2 * until

    def when(n: float) -> float:
        if n >= ramped:
            return until + (n - ramped) / later
        # rate·t + slope·t²/2 = n, in the form that is exact for slope 0 as well
        return 2 * n / (rate + math.sqrt(rate * rate + 2 * slope * n))

    return when


def _diurnal(rate: float, swing: float, period: float) -> When:
    if swing > 1:
        raise ValueError("a diurnal swing is at most 1")
    pace = 2 * math.pi / period

    def when(n: float) -> float:
        low, high = n / rate - period, n / rate + period
        for _ in range(60):
            middle = (low + high) / 2
            if rate * (middle - swing * math.sin(pace * middle) / pace) < n:
                low = middle
            else:
                high = middle
        return high

    return when


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """`count` arrivals of a steady Poisson process, as from many independent users."""
    return Arrivals(rate).times(count, seed)
