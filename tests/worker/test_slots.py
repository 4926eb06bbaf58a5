"""The packed inputs of a step, against a token-by-token construction."""

from __future__ import annotations

import random

import torch

from batching.core.types import SamplingParams, SequencePlan, SlotInit, StepPlan
from batching.worker.slots import SlotTables

BLOCK = 4
MAX_LEN = 64
PARAMS = SamplingParams(max_tokens=1)


def test_inputs_equal_the_definition_over_random_steps() -> None:
    rng = random.Random(3)
    tables = SlotTables(6, MAX_LEN, BLOCK, torch.device("cpu"))
    tokens: dict[int, list[int]] = {}
    blocks: dict[int, list[int]] = {}
    computed: dict[int, int] = {}
    for step in range(60):
        inits, sequences = [], []
        for slot in rng.sample(range(6), rng.randint(1, 6)):
            if slot not in tokens or rng.random() < 0.2 or len(tokens[slot]) >= MAX_LEN - 2:
                tokens[slot] = [rng.randrange(1000) for _ in range(rng.randint(1, 30))]
                blocks[slot] = []
                computed[slot] = rng.choice([0, 0, (len(tokens[slot]) - 1) // BLOCK * BLOCK])
                inits.append(SlotInit(slot, f"{step}", list(tokens[slot]), 1, PARAMS))
            start = computed[slot]
            count = rng.randint(1, len(tokens[slot]) - start)
            needed = -(-(start + count) // BLOCK) - len(blocks[slot])
            new = tuple(rng.randrange(500) for _ in range(max(0, needed)))
            blocks[slot] += new
            computed[slot] += count
            sequences.append(
                SequencePlan(slot, start, count, computed[slot] == len(tokens[slot]), new)
            )
        plan = StepPlan(step, tuple(inits), tuple(sequences))
        tables.begin(plan.inits)
        inputs = tables.build(plan)
        expected = [
            (tokens[s.slot][p], p, blocks[s.slot][p // BLOCK] * BLOCK + p % BLOCK)
            for s in sequences
            for p in range(s.start, s.start + s.count)
        ]
        columns = (inputs.tokens, inputs.positions, inputs.metadata.slot_mapping)
        assert [tuple(row) for row in torch.stack(columns, 1).tolist()] == expected
        ends = [s.start + s.count for s in sequences]
        metadata = inputs.metadata
        assert metadata.context.tolist() == ends == inputs.ends.tolist()
        assert metadata.query_start.dtype == metadata.block_tables.dtype == torch.int32
        assert metadata.counts == [s.count for s in sequences]
        assert metadata.contexts == ends
        bounds = metadata.query_start.tolist()
        assert bounds[0] == 0
        assert [b - 1 for b in bounds[1:]] == inputs.last_rows.tolist()
        for row, s in enumerate(sequences):
            assert bounds[row + 1] - bounds[row] == s.count
            used = -(-(s.start + s.count) // BLOCK)
            assert metadata.block_tables[row, :used].tolist() == blocks[s.slot][:used]
        sampled = [i for i, s in enumerate(sequences) if s.sample]
        new_tokens = torch.randint(1000, (len(sampled),))
        tables.append(inputs.slots[sampled], inputs.ends[sampled], new_tokens)
        for i, token in zip(sampled, new_tokens.tolist(), strict=True):
            tokens[sequences[i].slot].append(token)


def test_known_tokens_can_be_read_back() -> None:
    tables = SlotTables(2, MAX_LEN, BLOCK, torch.device("cpu"))
    tables.begin([SlotInit(1, "r", [5, 6, 7, 8], 4, PARAMS)])
    assert tables.tokens_at(1, 1, 3).tolist() == [6, 7]
    tables.begin([SlotInit(0, "q", [3, 4], 1, PARAMS)])
    assert tables.before([1, 0], [4, 2], 2).tolist() == [[7, 8], [3, 4]]
    assert tables.before([1], [3], 3).tolist() == [[5, 6, 7]]
    assert tables.before([0], [1], 4)[0, -1] == 3
    assert tables.before([0, 1], [1, 1], 0).shape == (2, 0)
