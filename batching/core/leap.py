"""Many equal steps at once, for simulations: exactly what as many calls of `commit` and `plan` do.

While nobody comes, ends or is preempted, every step is the one before with a token more for each
sequence. What changes from step to step is a few numbers, of which the cost model learns each time;
tokens, blocks and plans follow at the end.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from batching.core.cost_model import StepFeatures
from batching.core.scheduler import Scheduler
from batching.core.types import StepPlan, StepSummary


class LeapingScheduler(Scheduler):
    """The scheduler, and a way through steps of which nothing is new but their times."""

    @property
    def running(self) -> list[str]:
        """Ids of the sequences that have a slot."""
        return [s.id for s in self._residents.running]

    def steady_steps(self) -> int:
        """How often in a row a commit and a plan would only give every running sequence a token.

        At most a block's worth, so that none grows by more than a block; 0 if something else may be
        due. Holds until the next `add`, `abort` or `expire`, for tokens that end nobody.
        """
        running, flight = self._residents.running, self._in_flight
        if not running or len(flight) <= self.limits.overlap:
            return 0
        if len(self._waiting) and (self._waiting.is_fair or not self._residents.is_full):
            return 0  # somebody may enter
        if not all(draft.only_decodes(running) for draft in flight):
            return 0
        if not all(s.first_token_known for s in running):
            return 0  # the commit that ends a prompt has more to do
        size, free = self.limits.block_size, self._residents.pool.free
        count = min(size, *(s.compute_limit - s.computed for s in running))
        while sum(s.computed + count > len(s.blocks) * size for s in running) > free:
            count //= 2
        return count

    def leap(self, seconds: Seq[float], times: Seq[float], token: int) -> list[StepPlan]:
        """For each of `times`, of which there are one to `steady_steps()`: commit `token` for every
        sequence as the result of a step that took these `seconds`, and plan the next step.

        Returns the plans that are uncommitted then. Events are not made: each sequence that runs
        has got a token at each time.
        """
        running, flight, head = self._residents.running, self._in_flight, self._waiting.head()
        ahead, count, rows = len(flight), len(times), len(running)
        lack = None if head is None else self._residents.lack(head)
        began = [*(draft.began for draft in flight), *times]
        lacks = [*(draft.lack for draft in flight), *[lack] * count]
        forecasts = [draft.forecast for draft in flight]
        read = flight[0].features().context_tokens
        features = [StepFeatures(0, rows, read + i * rows) for i in range(count + ahead)]
        for step, time in enumerate(seconds):
            self.cost_model.update(features[step], time)
            forecasts.append(self.cost_model.predict(features[step + ahead]))
        last = count - 1
        self._totals.count_steps(seconds, rows, forecasts[last])
        self._totals.generated += count * rows
        self.last_step = StepSummary(began[last], times[last], rows, lack=lacks[last])
        self._planned += count
        self._residents.decode(count, token, ahead)
        for then, draft in enumerate(flight, start=count):
            draft.move_on(count, began[then], lacks[then], forecasts[then])
        size = self.limits.block_size
        return [draft.reseal(ahead - place, size) for place, draft in enumerate(flight)]
