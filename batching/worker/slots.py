"""What the device remembers of each slot, and a step's packed inputs made from it.

Token rows and block tables are persistent and updated in place; a plan names only what is new.
Building a step's inputs is a fixed number of tensor operations over its sequences and tokens, and
looks at no cached token. `triton_slots.py` does it in fewer on GPUs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from batching.core.types import SlotInit, StepPlan
from batching.worker.attention import AttentionMetadata
from batching.worker.device import upload
from batching.worker.protocol import Capabilities


@dataclass
class StepInputs:
    """One step's packed tokens, int64 [tokens], their positions, and the attention's geometry.

    The rest is about the sequences to sample, in plan order: `sampled` are their numbers in the
    plan, `last_rows` [n] their last packed tokens (None: the first n), `slots` and `ends` [n] their
    slots, and the positions after their last tokens, where sampled tokens go.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    sampled: list[int]
    last_rows: torch.Tensor | None
    slots: torch.Tensor
    ends: torch.Tensor

    def last(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states [tokens, width], those of the tokens before the sampled ones."""
        if self.last_rows is not None:
            return hidden.index_select(0, self.last_rows)
        return hidden if len(self.sampled) == len(hidden) else hidden[: len(self.sampled)]


class SlotTables:
    """Token rows int32 [slots, max_model_len + 1] and block tables int32.

    There are as many slots as sequences, and `dummies` behind them.
    """

    def __init__(self, limits: Capabilities, device: torch.device, dummies: int = 0) -> None:
        self._device = device
        self._block_size = limits.block_size
        # One more token than a sequence may have: with overlap, a step past the end is computed
        # before the end is known.
        slots, width = limits.max_sequences + dummies, limits.max_model_len + 1
        blocks = -(-width // limits.block_size)
        self.rows = torch.zeros(slots, width, dtype=torch.int32, device=device)
        self.tables = torch.zeros(slots, blocks, dtype=torch.int32, device=device)
        self._table_lengths = [0] * limits.max_sequences

    def begin(self, inits: Sequence[SlotInit]) -> None:
        """Let each slot forget what it held, and take in its tokens."""
        if not inits:
            return
        lengths = [len(init.tokens) for init in inits]
        tokens = array("i", chain.from_iterable(init.tokens for init in inits))
        sent = self._upload(np.frombuffer(tokens, np.int32), torch.int32).split(lengths)
        for init, row in zip(inits, sent, strict=True):
            self._table_lengths[init.slot] = 0
            self.rows[init.slot, : len(row)] = row

    def build(self, plan: StepPlan) -> StepInputs:
        """The inputs of a plan whose inits were taken in; appends its new blocks first."""
        new = self._new_blocks(plan)
        if new[0]:
            row, column, block = self._upload(new, torch.int64)
            self.tables[row, column] = block.int()
        sequences = plan.sequences
        counts = [s.count for s in sequences]
        contexts = [s.start + s.count for s in sequences]
        slots, starts, lengths = self._upload(
            [[s.slot for s in sequences], [s.start for s in sequences], counts], torch.int64
        )
        ends = starts + lengths
        query_start = torch.zeros(len(counts) + 1, dtype=torch.int32, device=self._device)
        torch.cumsum(lengths, 0, dtype=torch.int32, out=query_start[1:])
        is_decode = max(counts) == 1
        if is_decode:
            token_slots, positions = slots, starts
        else:
            token_slots, positions = self._spread(slots, starts, lengths, query_start, sum(counts))
        width = -(-max(contexts) // self._block_size)
        block = self.tables[token_slots, positions // self._block_size].long()
        metadata = AttentionMetadata(
            query_start=query_start,
            context=ends.int(),
            block_tables=self.tables[:, :width].index_select(0, slots),
            slot_mapping=block * self._block_size + positions % self._block_size,
            block_size=self._block_size,
            counts=counts,
            contexts=contexts,
        )
        tokens = self.rows[token_slots, positions].long()
        sampled = [i for i, s in enumerate(sequences) if s.sample]
        last_rows = None if is_decode else query_start[1:] - 1
        if len(sampled) < len(sequences):
            chosen = self._upload(sampled, torch.int64)
            last_rows = chosen if last_rows is None else last_rows[chosen]
            slots, ends = slots[chosen], ends[chosen]
        return StepInputs(tokens, positions, metadata, sampled, last_rows, slots, ends)

    def append(self, slots: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write sampled tokens, int64 [n], into the rows of their slots."""
        self.rows[slots, positions] = tokens.int()

    def before(self, slots: Sequence[int], ends: Sequence[int], count: int) -> torch.Tensor:
        """The `count` tokens int64 [n, count] before positions `ends`; rubbish before the first."""
        slot, end = self._upload([list(slots), list(ends)], torch.int64)
        positions = end[:, None] - torch.arange(count, 0, -1, device=self._device)
        return self.rows[slot[:, None], positions.clamp(min=0)].long()

    def tokens_at(self, slot: int, start: int, stop: int) -> torch.Tensor:
        """Known tokens int64 [stop - start] of a slot."""
        return self.rows[slot, start:stop].long()

    def _new_blocks(self, plan: StepPlan) -> list[list[int]]:
        """Rows, columns and values of what is new in the block tables; counts it as there."""
        rows: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for sequence in plan.sequences:
            if sequence.new_blocks:
                length = self._table_lengths[sequence.slot]
                added = len(sequence.new_blocks)
                rows += [sequence.slot] * added
                columns += range(length, length + added)
                blocks += sequence.new_blocks
                self._table_lengths[sequence.slot] = length + added
        return [rows, columns, blocks]

    def _spread(
        self,
        slots: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        query_start: torch.Tensor,
        total: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slot and position of every packed token, int64 [total]."""
        base = torch.stack([slots, starts - query_start[:-1]])
        slot, offset = base.repeat_interleave(lengths, dim=1, output_size=total)
        return slot, offset + torch.arange(total, device=self._device)

    def _upload(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        return upload(values, dtype, self._device)
