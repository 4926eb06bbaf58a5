"""When a waiting sequence may start: the estimated future peak of blocks."""

from __future__ import annotations

from collections.abc import Iterable

_QUANTILE = 0.8  # of the finished requests' output share
_STEP = 1.3  # factor between an estimate of no and full correction
_AFTER_PREEMPTION = 1.25
_LOWEST = 0.01


class OutputForecast:
    """How much of the tokens it may still generate a request will use.

    A running quantile (stochastic approximation, in the logarithm because clients that name no
    limit have shares far below one) of output / allowed output over finished requests. A
    preemption means the forecast was too low and raises it at once.
    """

    def __init__(self, share: float = 0.5) -> None:
        self.share = share

    def finished(self, generated: int, allowed: int) -> None:
        """Learn from a request that generated so many of the allowed tokens."""
        if allowed <= 0:
            return
        above = generated > self.share * allowed
        self._scale(_STEP**_QUANTILE if above else _STEP ** (_QUANTILE - 1.0))

    def preempted(self) -> None:
        """Learn from a shortage of blocks."""
        self._scale(_AFTER_PREEMPTION)

    def remaining(self, allowed: int) -> int:
        """Tokens expected of a sequence that may generate `allowed` more; at least one if any."""
        return min(allowed, 1 + int(self.share * allowed))

    def _scale(self, factor: float) -> None:
        self.share = min(1.0, max(_LOWEST, self.share * factor))


def future_peak(sequences: Iterable[tuple[int, int]]) -> int:
    """Most blocks owned at any future moment, if sequences grow in step and leave when done.

    `sequences` holds (blocks still to grow, blocks owned) of each. Sorted by growth, longest
    first, the moments at which one ends are the only candidates: when the i-th ends, it and those
    before it have all grown by its growth. The estimate is lightllm's (token units there).
    """
    owned_before = 0
    peak = 0
    for count, (growth, owned) in enumerate(sorted(sequences, reverse=True), start=1):
        owned_before += owned
        peak = max(peak, owned_before + count * growth)
    return peak
