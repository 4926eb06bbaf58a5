"""What the scheduler counts, and what it tells the front end after each step."""

from __future__ import annotations

from collections.abc import Iterable

from batching.core.cost_model import CostModel, StepFeatures
from batching.core.policy import WaitingQueue
from batching.core.residents import Residents
from batching.core.sequence import Sequence
from batching.core.types import EngineStats, Limits, Outlook

_TRUSTED_UPDATES = 8  # steps before the cost model is more than its prior


class Totals:
    """Counters behind `EngineStats`."""

    __slots__ = ("forecast", "forward_seconds", "generated", "prefilled", "prefilling", "prompt",
                 "step_seconds", "step_tokens", "steps")  # fmt: skip

    def __init__(self) -> None:
        self.steps = self.step_tokens = self.prompt = self.generated = 0
        self.prefilling = self.prefilled = 0  # sequences in mid-prompt, their computed tokens
        self.step_seconds = self.forward_seconds = self.forecast = 0.0

    def count_steps(self, seconds: Iterable[float], tokens: int, forecast: float) -> None:
        """Steps were committed; so many tokens were computed in the last."""
        for time in seconds:
            self.steps += 1
            self.step_seconds = time
            self.forward_seconds += time
        self.step_tokens = tokens
        self.forecast = forecast

    def count_prefills(self, sequences: Iterable[Sequence]) -> None:
        """Of these, which have prompts to compute, those are in mid-prompt that sample nothing."""
        unfinished = [s.computed for s in sequences if not s.pending]
        self.prefilling, self.prefilled = len(unfinished), sum(unfinished)

    def stats(
        self, residents: Residents, waiting: WaitingQueue, cost_model: CostModel, limits: Limits
    ) -> EngineStats:
        """Gauges and totals as of now. O(1)."""
        pool = residents.pool
        outlook = None
        if cost_model.updates >= _TRUSTED_UPDATES:
            outlook = self._outlook(residents, cost_model, limits)
        return EngineStats(
            running=len(residents.running),
            waiting=len(waiting),
            blocks_total=pool.num_blocks,
            blocks_used=pool.num_blocks - pool.free,
            blocks_cached=pool.cached,
            steps=self.steps,
            step_tokens=self.step_tokens,
            step_seconds=self.step_seconds,
            forward_seconds=self.forward_seconds,
            prompt_tokens=self.prompt,
            generation_tokens=self.generated,
            prefix_queries=residents.queries,
            prefix_hits=residents.hits,
            preemptions=residents.preemptions,
            predicted_step_seconds=self.forecast,
            outlook=outlook,
        )

    def _outlook(self, residents: Residents, cost_model: CostModel, limits: Limits) -> Outlook:
        decodes = max(len(residents.running) - self.prefilling, 0)
        context = (residents.pool.num_blocks - residents.pool.free) * limits.block_size
        decode = cost_model.predict(StepFeatures(0, decodes, context if decodes else 0))
        return Outlook(
            cost=cost_model.coefficients,
            decode_seconds=decode,
            prefill_seconds=limits.prefill_seconds(decode),
            prefilling=self.prefilling,
            prefilled_tokens=self.prefilled,
            output_tokens=residents.expected_output(),
            blocked=residents.blocked,
        )
