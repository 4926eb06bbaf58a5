"""How long a step will take: a linear model fitted online.

    seconds ≈ a + b·prefill tokens + c·sequences + d·context tokens read + e·prefill pairs

"Pairs" are the (query, key) pairs of prefill attention: without them a chunk at the end of a
long prompt would be priced like one at its start.
"""

from __future__ import annotations

import math

import msgspec

from batching.core.types import Coefficients, StepPlan


class StepFeatures(msgspec.Struct, frozen=True, array_like=True):
    """What a step's duration depends on. Sequences with one token in the step are no prefill."""

    prefill_tokens: int
    sequences: int
    context_tokens: int  # positions attended to: start + count, summed over sequences
    prefill_pairs: int = 0  # count · (start + count / 2), summed over prefills

    @classmethod
    def of(cls, plan: StepPlan) -> StepFeatures:
        """The features of a plan."""
        prefills = [s for s in plan.sequences if s.count > 1]
        return cls(
            sum(s.count for s in prefills),
            len(plan.sequences),
            sum(s.start + s.count for s in plan.sequences),
            sum(s.count * (2 * s.start + s.count) // 2 for s in prefills),
        )


class CostState(msgspec.Struct, frozen=True):
    """A fitted model, to be stored and resumed from."""

    coefficients: Coefficients
    covariance: tuple[tuple[float, ...], ...]
    relative_error: float
    updates: int


_TERMS = 5
_PRIOR = msgspec.structs.astuple(Coefficients())
_PRIOR_VARIANCE = 25.0  # of a coefficient in units of its prior mean
_NOISE_VARIANCE = 0.01  # of a step's duration relative to itself
_FORGETTING = 0.99  # half the weight after about 70 steps
_ERROR_DECAY = 0.95
_EXACT = 1e-3  # relative error below which a forecast leaves nothing to learn


class CostModel:
    """Recursive least squares with forgetting on relative errors.

    Coefficients are kept in units of the prior, each observation is divided by its own size, and
    an error beyond a few times the usual one is weighted down (Huber), so a stalled step moves
    little, and a forecast that was right nothing. Negative coefficients are projected to zero.
    Forgetting never makes the model less certain than the prior: decode-only hours do not unlearn
    prefill. O(1) per step; pure.
    """

    def __init__(self, state: CostState | None = None) -> None:
        self.relative_error = 0.3  # running mean of |error| / larger of forecast and actual
        self.updates = 0
        self._scaled = [1.0] * _TERMS
        self._covariance = [
            [_PRIOR_VARIANCE if i == j else 0.0 for j in range(_TERMS)] for i in range(_TERMS)
        ]
        if state is not None:
            fitted = msgspec.structs.astuple(state.coefficients)
            self._scaled = [value / unit for value, unit in zip(fitted, _PRIOR, strict=True)]
            self._covariance = [list(row) for row in state.covariance]
            self.relative_error = state.relative_error
            self.updates = state.updates
        self._publish()

    def _publish(self) -> None:
        values = [scaled * unit for scaled, unit in zip(self._scaled, _PRIOR, strict=True)]
        self.coefficients = Coefficients(*values)

    def state(self) -> CostState:
        """The model as a value; `CostModel(state)` continues where this one is."""
        covariance = tuple(tuple(row) for row in self._covariance)
        return CostState(self.coefficients, covariance, self.relative_error, self.updates)

    def predict(self, features: StepFeatures) -> float:
        """Seconds that a step with these features takes."""
        k = self.coefficients
        return (
            k.step
            + k.prefill_token * features.prefill_tokens
            + k.sequence * features.sequences
            + k.context_token * features.context_tokens
            + k.prefill_pair * features.prefill_pairs
        )

    def chunk_seconds(self, start: int, count: int) -> float:
        """Seconds that a prefill chunk of `count` tokens at `start` adds to a step."""
        k = self.coefficients
        return (
            k.sequence
            + k.context_token * (start + count)
            + k.prefill_token * count
            + k.prefill_pair * count * (start + count / 2)
        )

    def largest_chunk(self, start: int, seconds: float, limit: int) -> int:
        """The most tokens, at most `limit`, a chunk at `start` may have to add <= `seconds`."""
        k = self.coefficients
        if self.chunk_seconds(start, limit) <= seconds:  # also if nothing costs, or time has no end
            return limit
        room = seconds - k.sequence - k.context_token * start
        if room <= 0.0:
            return 0
        slope = k.prefill_token + k.context_token + k.prefill_pair * start
        root = slope + math.sqrt(slope * slope + 2.0 * k.prefill_pair * room)
        return min(limit, int(2.0 * room / root))

    def update(self, features: StepFeatures, seconds: float) -> None:
        """Learn from a step that took `seconds`. Times that are no positive number are ignored."""
        if not 0.0 < seconds < math.inf:
            return
        forecast = self.predict(features)
        scale = max(forecast, seconds)
        error = (seconds - forecast) / scale
        usual = 3.0 * self.relative_error + 0.02
        # A lasting change must get through: what is surprising now widens what is usual.
        surprise = min(abs(error), 2.0 * usual)
        self.relative_error += (1.0 - _ERROR_DECAY) * (surprise - self.relative_error)
        self.updates += 1
        if abs(error) < _EXACT:
            return
        x = [
            _PRIOR[0] / scale,
            _PRIOR[1] * features.prefill_tokens / scale,
            _PRIOR[2] * features.sequences / scale,
            _PRIOR[3] * features.context_tokens / scale,
            _PRIOR[4] * features.prefill_pairs / scale,
        ]
        noise = _NOISE_VARIANCE * max(1.0, abs(error) / usual)
        px = [sum(p * v for p, v in zip(row, x, strict=True)) for row in self._covariance]
        variance = noise + sum(p * v for p, v in zip(px, x, strict=True))
        self._scaled = [s + p * error / variance for s, p in zip(self._scaled, px, strict=True)]
        self._covariance = [
            [(p - a * b / variance) / _FORGETTING for p, b in zip(row, px, strict=True)]
            for row, a in zip(self._covariance, px, strict=True)
        ]
        self._bound_covariance()
        self._project()
        self._publish()

    def _bound_covariance(self) -> None:
        """Scale rows and columns down to the prior's variance (keeps it positive definite)."""
        for i in range(_TERMS):
            variance = self._covariance[i][i]
            if variance > _PRIOR_VARIANCE:
                shrink = math.sqrt(_PRIOR_VARIANCE / variance)
                for j in range(_TERMS):
                    self._covariance[i][j] *= shrink
                    self._covariance[j][i] *= shrink

    def _project(self) -> None:
        """Condition on zero for negative coefficients, then clip what that made negative."""
        for i in range(_TERMS):
            value = self._scaled[i]
            if value < 0.0:
                column = self._covariance[i]
                self._scaled = [
                    s - c * value / column[i] for s, c in zip(self._scaled, column, strict=True)
                ]
        self._scaled = [max(0.0, s) for s in self._scaled]
