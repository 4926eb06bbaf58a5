"""The packed inputs of a step, against a token-by-token construction."""

from __future__ import annotations

import random

import torch

from batching.core.types import SamplingParams, SequencePlan, SlotInit, StepPlan
from batching.worker.protocol import Capabilities
from batching.worker.slots import SlotTables

BLOCK = 4
MAX_LEN = 64
PARAMS = SamplingParams(max_tokens=1)
SPARE = 777  # the block behind the last


def limits_of(slots: int, max_len: int = MAX_LEN) -> Capabilities:
    return Capabilities("", "", 9, max_len, SPARE, BLOCK, slots, 64, "", "", "")


class Plans:
    """Random plans, and what a device should hold by then: by slot, its tokens and blocks."""

    def __init__(self, slots: int, seed: int = 3) -> None:
        self._rng, self._slots = random.Random(seed), slots
        self._computed: dict[int, int] = {}
        self._step = 0
        self.tokens: dict[int, list[int]] = {}
        self.blocks: dict[int, list[int]] = {}

    def next(self, *, decode: bool = False) -> StepPlan:
        """Of some slots; `decode` lets those that have one token to compute do that."""
        rng, inits, sequences = self._rng, [], []
        self._step += 1
        for slot in rng.sample(range(self._slots), rng.randint(1, self._slots)):
            known = self.tokens.get(slot, [])
            if decode and len(known) - self._computed.get(slot, 0) != 1:
                continue
            if not known or len(known) >= MAX_LEN - 2 or (not decode and rng.random() < 0.2):
                known = self.tokens[slot] = [rng.randrange(1000) for _ in range(rng.randint(1, 30))]
                self.blocks[slot] = []
                self._computed[slot] = rng.choice([0, 0, (len(known) - 1) // BLOCK * BLOCK])
                inits.append(SlotInit(slot, f"{self._step}", list(known), 1, PARAMS))
            start = self._computed[slot]
            count = rng.randint(1, len(known) - start)
            needed = -(-(start + count) // BLOCK) - len(self.blocks[slot])
            new = tuple(rng.randrange(500) for _ in range(max(0, needed)))
            self.blocks[slot] += new
            self._computed[slot] += count
            is_whole = self._computed[slot] == len(known)
            sequences.append(SequencePlan(slot, start, count, is_whole, new))
        return StepPlan(self._step, tuple(inits), tuple(sequences))

    def sampled(self, plan: StepPlan) -> torch.Tensor:
        """Tokens int64 [n], as if they were sampled; takes them in."""
        slots = [s.slot for s in plan.sequences if s.sample]
        drawn = [self._rng.randrange(1000) for _ in slots]
        for slot, token in zip(slots, drawn, strict=True):
            self.tokens[slot].append(token)
        return torch.tensor(drawn, dtype=torch.int64)


def test_inputs_equal_the_definition_over_random_steps() -> None:
    tables = SlotTables(limits_of(6), torch.device("cpu"))
    plans = Plans(6)
    for _ in range(60):
        plan = plans.next()
        sequences = plan.sequences
        tables.begin(plan.inits)
        inputs = tables.build(plan)
        expected = [
            (plans.tokens[s.slot][p], p, plans.blocks[s.slot][p // BLOCK] * BLOCK + p % BLOCK)
            for s in sequences
            for p in range(s.start, s.start + s.count)
        ]
        columns = (inputs.tokens, inputs.positions, inputs.metadata.slot_mapping)
        assert [tuple(row) for row in torch.stack(columns, 1).tolist()] == expected
        ends = [s.start + s.count for s in sequences]
        metadata = inputs.metadata
        assert metadata.context.tolist() == ends
        assert metadata.query_start.dtype == metadata.block_tables.dtype == torch.int32
        assert metadata.counts == [s.count for s in sequences]
        assert metadata.contexts == ends
        bounds = metadata.query_start.tolist()
        assert bounds[0] == 0
        for row, s in enumerate(sequences):
            assert bounds[row + 1] - bounds[row] == s.count
            used = -(-(s.start + s.count) // BLOCK)
            assert metadata.block_tables[row, :used].tolist() == plans.blocks[s.slot][:used]
        sampled = [i for i, s in enumerate(sequences) if s.sample]
        assert inputs.sampled == sampled
        assert inputs.slots.tolist() == [sequences[i].slot for i in sampled]
        assert inputs.ends.tolist() == [ends[i] for i in sampled]
        packed = torch.arange(len(expected))[:, None]
        assert inputs.last(packed)[:, 0].tolist() == [bounds[i + 1] - 1 for i in sampled]
        tables.append(inputs.slots, inputs.ends, plans.sampled(plan))


def test_known_tokens_can_be_read_back() -> None:
    tables = SlotTables(limits_of(3), torch.device("cpu"))
    tables.begin([SlotInit(1, "r", [5, 6, 7, 8], 4, PARAMS)])
    assert tables.tokens_at(1, 1, 3).tolist() == [6, 7]
    tables.begin([SlotInit(0, "q", [3, 4], 1, PARAMS), SlotInit(2, "s", [9], 1, PARAMS)])
    assert tables.tokens_at(2, 0, 1).tolist() == [9]
    assert tables.before([1, 0], [4, 2], 2).tolist() == [[7, 8], [3, 4]]
    assert tables.before([1], [3], 3).tolist() == [[5, 6, 7]]
    assert tables.before([0], [1], 4)[0, -1] == 3
    assert tables.before([0, 1], [1, 1], 0).shape == (2, 0)
