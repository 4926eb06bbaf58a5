"""A step while it is planned, and then while it is in flight."""

from __future__ import annotations

from batching.core.cost_model import StepFeatures
from batching.core.sequence import Sequence
from batching.core.types import Lack, SequencePlan, SlotInit, StepPlan, StepSummary


class Draft:
    """The shares placed so far, the sequences they belong to, and what the step will cost."""

    __slots__ = (
        "_chunks", "_context", "_inits", "_pairs", "_prefill_tokens", "_shares", "began", "epochs",
        "forecast", "lack", "plan", "preempted", "samples", "sequences", "shortage", "step",
        "tokens",
    )  # fmt: skip

    def __init__(self, step: int, now: float) -> None:
        self.step = step
        self.began = now
        self.sequences: list[Sequence] = []
        self.epochs: list[int] = []  # the sequences' epochs when they were placed
        self.samples = 0
        self.tokens = 0  # computed in the step
        self.shortage = False  # a decode lacked a block: no new sequences in this step
        self.preempted: list[str] = []
        self.lack: Lack | None = None  # what somebody still waits for
        self.forecast = 0.0  # seconds
        self.plan: StepPlan
        self._inits: list[SlotInit] = []
        self._shares: list[SequencePlan] = []
        self._chunks: list[tuple[str, int, int]] = []
        self._prefill_tokens = self._context = self._pairs = 0

    def place(self, sequence: Sequence, count: int, new_blocks: tuple[int, ...]) -> None:
        """Give the sequence a share of the step: its next `count` tokens."""
        start = sequence.computed
        end = start + count
        sample = end == len(sequence.tokens) + sequence.pending < sequence.length_limit
        if count > 1 or sequence.fresh:
            self._chunks.append((sequence.id, start, count))
        if sequence.fresh:
            sequence.fresh = False
            new_blocks = tuple(sequence.blocks)
            # A copy: the sequence goes on growing while the plan is sent and logged.
            tokens = list(sequence.tokens)
            params = sequence.request.params
            self._inits.append(
                SlotInit(sequence.slot, sequence.id, tokens, sequence.prompt_length, params)
            )
        self._shares.append(SequencePlan(sequence.slot, start, count, sample, new_blocks))
        self.sequences.append(sequence)
        self.epochs.append(sequence.epoch)
        self.tokens += count
        self._context += end
        if count > 1:
            self._prefill_tokens += count
            self._pairs += count * (start + end) // 2
        if sample:
            sequence.pending += 1
            self.samples += 1
        sequence.computed = end
        sequence.last_step = self.step

    def features(self) -> StepFeatures:
        """What `StepFeatures.of` would say of the shares so far, without going over them."""
        return StepFeatures(self._prefill_tokens, len(self._shares), self._context, self._pairs)

    def summary(self, now: float) -> StepSummary:
        """What it was made of, its result being known `now`."""
        return StepSummary(
            self.began,
            now,
            len(self._shares),
            tuple(self._chunks),
            tuple(self.preempted),
            self.lack,
        )

    def seal(self) -> StepPlan:
        """The finished plan."""
        self.plan = StepPlan(self.step, tuple(self._inits), tuple(self._shares))
        return self.plan

    # -- the same again, for simulations ---------------------------------------------------------

    def only_decodes(self, running: list[Sequence]) -> bool:
        """Whether it is a token for each of `running`, after a token, and nothing else."""
        return (
            self.samples == self.tokens == len(running)
            and not (self._chunks or self.preempted or self.shortage)
            and self.sequences == running
        )

    def move_on(self, steps: int, now: float, lack: Lack | None, forecast: float) -> None:
        """Become the step so many later, planned `now`, of the same sequences, which have grown."""
        self.step += steps
        self.began = now
        self.lack = lack
        self.forecast = forecast
        self._context += steps * len(self.sequences)

    def reseal(self, behind: int, block_size: int) -> StepPlan:
        """The plan after a move, when sequences have computed `behind` tokens since its start."""
        self._shares = []
        for sequence in self.sequences:
            start = sequence.computed - behind
            block, within = divmod(start, block_size)
            new_blocks = () if within else (sequence.blocks[block],)
            self._shares.append(SequencePlan(sequence.slot, start, 1, True, new_blocks))
        return self.seal()
