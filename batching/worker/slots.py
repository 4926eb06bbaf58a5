"""What the device remembers of each slot, and a step's packed inputs made from it.

Token rows and block tables are persistent and updated in place; a plan names only what is new.
Building a step's inputs is a fixed number of tensor operations over its sequences and tokens, and
looks at no cached token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from batching.core.types import SlotInit, StepPlan
from batching.worker.attention import AttentionMetadata
from batching.worker.device import upload


@dataclass
class StepInputs:
    """One step's packed tokens, int64 [tokens], their positions, and the attention's geometry.

    `last_rows` int64 [sequences]: each sequence's last packed token. `slots` and `ends` int64
    [sequences]: the slot, and the position after its last token, where a sampled token goes. The
    packed tokens and the metadata have the padding, too; the rest has not.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    last_rows: torch.Tensor
    slots: torch.Tensor
    ends: torch.Tensor


class SlotTables:
    """Token rows int32 [max_sequences + 1, max_model_len + 1] and block tables int32.

    The last slot is the dummy's, on the block `spare`: padding computes its first token.
    """

    def __init__(
        self,
        max_sequences: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        spare: int = 0,
    ) -> None:
        self._device = device
        self._block_size = block_size
        # One more token than a sequence may have: with overlap, a step past the end is computed
        # before the end is known.
        width = max_model_len + 1
        shape = (max_sequences + 1, width)
        self._rows = torch.zeros(shape, dtype=torch.int32, device=device)
        self._tables = torch.full(
            (max_sequences + 1, -(-width // block_size)), spare, dtype=torch.int32, device=device
        )
        self._dummy = max_sequences
        self._table_lengths = [0] * max_sequences

    def begin(self, inits: Sequence[SlotInit]) -> None:
        """Let each slot forget what it held, and take in its tokens."""
        for init in inits:
            self._table_lengths[init.slot] = 0
            self._rows[init.slot, : len(init.tokens)] = self._upload(init.tokens, torch.int32)

    def build(self, plan: StepPlan, padding: int = 0) -> StepInputs:
        """The inputs of a plan whose inits were taken in; appends its new blocks first.

        `padding` dummy sequences of one token each come last.
        """
        self._append_blocks(plan)
        sequences, real = plan.sequences, len(plan.sequences)
        counts = [s.count for s in sequences] + [1] * padding
        contexts = [s.start + s.count for s in sequences] + [1] * padding
        numbers = [s.slot for s in sequences] + [self._dummy] * padding
        begins = [s.start for s in sequences] + [0] * padding
        slots, starts, lengths = self._upload([numbers, begins, counts], torch.int64)
        ends = starts + lengths
        query_start = torch.zeros(len(counts) + 1, dtype=torch.int32, device=self._device)
        torch.cumsum(lengths, 0, dtype=torch.int32, out=query_start[1:])
        if max(counts) == 1:
            token_slots, positions = slots, starts
        else:
            token_slots, positions = self._spread(slots, starts, lengths, query_start, sum(counts))
        width = -(-max(contexts) // self._block_size)
        block = self._tables[token_slots, positions // self._block_size].long()
        metadata = AttentionMetadata(
            query_start=query_start,
            context=ends.int(),
            block_tables=self._tables[:, :width].index_select(0, slots),
            slot_mapping=block * self._block_size + positions % self._block_size,
            block_size=self._block_size,
            counts=counts,
            contexts=contexts,
        )
        tokens = self._rows[token_slots, positions].long()
        last_rows = query_start[1 : real + 1].long() - 1
        return StepInputs(tokens, positions, metadata, last_rows, slots[:real], ends[:real])

    def append(self, slots: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write sampled tokens, int64 [n], into the rows of their slots."""
        self._rows[slots, positions] = tokens.int()

    def before(self, slots: Sequence[int], ends: Sequence[int], count: int) -> torch.Tensor:
        """The `count` tokens int64 [n, count] before positions `ends`; rubbish before the first."""
        slot, end = self._upload([list(slots), list(ends)], torch.int64)
        positions = end[:, None] - torch.arange(count, 0, -1, device=self._device)
        return self._rows[slot[:, None], positions.clamp(min=0)].long()

    def tokens_at(self, slot: int, start: int, stop: int) -> torch.Tensor:
        """Known tokens int64 [stop - start] of a slot."""
        return self._rows[slot, start:stop].long()

    def _append_blocks(self, plan: StepPlan) -> None:
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
        if blocks:
            row, column, block = self._upload([rows, columns, blocks], torch.int64)
            self._tables[row, column] = block.int()

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

    def _upload(self, values: list[int] | list[list[int]], dtype: torch.dtype) -> torch.Tensor:
        return upload(values, dtype, self._device)
