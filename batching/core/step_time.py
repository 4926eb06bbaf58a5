"""How long steps take on known hardware: what the twin runs on.

The scheduler's own forecast (`cost_model`) is linear and learns online, since it must be cheap and
know nothing. This one is measured or estimated beforehand and may bend: matrices cost their weights
until there are enough rows to be busy with arithmetic.

    seconds = curve(rows) + sample·samples + context·positions read by decodes + pair·prefill pairs
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import msgspec

from batching.core.types import StepPlan

_SWEEPS = 4000
_TERMS = 3  # beside the curve


class StepLoad(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a step's duration depends on."""

    rows: int  # tokens computed
    samples: int  # tokens sampled
    context: int  # positions attended to by sequences with one token
    pairs: int  # (query, key) pairs of all others

    @classmethod
    def of(cls, plan: StepPlan) -> StepLoad:
        """The load of a plan."""
        rows = samples = context = pairs = 0
        for sequence in plan.sequences:
            count = sequence.count
            rows += count
            samples += sequence.sample
            if count == 1:
                context += sequence.start + 1
            else:
                pairs += count * (2 * sequence.start + count) // 2
        return cls(rows, samples, context, pairs)


class StepTime(msgspec.Struct, frozen=True):
    """The model above. The curve is linear between knots, and goes on like its last piece."""

    knots: tuple[int, ...]  # rows, ascending, at least two
    curve: tuple[float, ...]  # seconds at each
    sample: float = 0.0
    context: float = 0.0
    pair: float = 0.0

    def seconds(self, load: StepLoad) -> float:
        """Time of a step."""
        return (
            self._base(load.rows)
            + self.sample * load.samples
            + self.context * load.context
            + self.pair * load.pairs
        )

    def decode_seconds(self, sequences: int, context: int, steps: int) -> list[float]:
        """Times of steps that give each sequence a token; the first reads so many positions."""
        fixed = self._base(sequences) + self.sample * sequences
        end = context + steps * sequences
        return [fixed + self.context * read for read in range(context, end, sequences)]

    def _base(self, rows: int) -> float:
        left, share = _place(rows, self.knots)
        base = self.curve[left] + share * (self.curve[left + 1] - self.curve[left])
        return max(base, 0.0)


def fit(samples: Sequence[tuple[StepLoad, float]], knots: Sequence[int]) -> StepTime:
    """The least squares of relative errors, with no coefficient below zero.

    Knots that no samples are near are dropped. Raises `ValueError` with too few samples.
    """
    rows = sorted(load.rows for load, _ in samples)
    used = sorted({k for k in knots if rows and k < rows[-1]} | set(rows[-1:]))
    while len(used) > 2 and (lonely := _least_supported(rows, used)) is not None:
        used.remove(lonely)
    if len(samples) < len(used) + _TERMS or len(used) < 2:
        raise ValueError(f"{len(samples)} steps are too few to fit a step time")
    size = len(used) + _TERMS
    matrix = [[0.0] * size for _ in range(size)]
    target = [0.0] * size
    for load, seconds in samples:
        row = [x / seconds for x in _terms(load, used)]
        for i, a in enumerate(row):
            if a:
                target[i] += a
                for j, b in enumerate(row):
                    matrix[i][j] += a * b
    found = _nonnegative(matrix, target)
    sample, context, pair = found[-_TERMS:]
    return StepTime(tuple(used), tuple(found[:-_TERMS]), sample, context, pair)


def relative_error(model: StepTime, samples: Sequence[tuple[StepLoad, float]]) -> float:
    """Mean of |prediction / time - 1|."""
    return sum(abs(model.seconds(load) / s - 1) for load, s in samples) / len(samples)


def _least_supported(rows: Sequence[int], knots: Sequence[int]) -> int | None:
    """The knot with the least weight of samples, if that is less than half a sample's."""
    support = [0.0] * len(knots)
    for count in rows:
        left, share = _place(count, knots)
        support[left] += 1 - share
        support[left + 1] += share
    least = min(range(len(knots)), key=lambda i: support[i])
    return knots[least] if support[least] < 0.5 else None


def _place(rows: int, knots: Sequence[int]) -> tuple[int, float]:
    """The piece of the curve that `rows` lie on, and how far along."""
    left = min(max(bisect_right(knots, rows) - 1, 0), len(knots) - 2)
    return left, (rows - knots[left]) / (knots[left + 1] - knots[left])


def _terms(load: StepLoad, knots: Sequence[int]) -> list[float]:
    weights = [0.0] * len(knots)
    left, share = _place(load.rows, knots)
    weights[left], weights[left + 1] = 1 - share, share
    return [*weights, float(load.samples), float(load.context), float(load.pairs)]


def _nonnegative(matrix: list[list[float]], target: list[float]) -> list[float]:
    """Minimise the quadratic form over x >= 0, coordinate by coordinate (Gauss-Seidel)."""
    x = [0.0] * len(target)
    for _ in range(_SWEEPS):
        for i, row in enumerate(matrix):
            if row[i] > 0:
                residual = target[i] - sum(a * b for a, b in zip(row, x, strict=True))
                x[i] = max(0.0, x[i] + residual / row[i])
    return x
