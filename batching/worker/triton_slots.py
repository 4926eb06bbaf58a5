"""A step's inputs on GPUs: one upload and a launch or two, straight to where the layers read them.

What the host knows (slots, positions, new blocks, the attention's work) crosses together. Block
tables are read where they are, since the attention's work names slots. `SlotTables.build` says what
comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton

from batching.core.types import StepPlan
from batching.worker.attention import AttentionMetadata, LayerSpec
from batching.worker.attention_triton import Kind, TritonAttention, kind_of
from batching.worker.attention_work import FIELDS, Division, spread
from batching.worker.device import upload, upload_together
from batching.worker.protocol import Capabilities
from batching.worker.slot_kernels import write_at, write_inputs
from batching.worker.slots import SlotTables, StepInputs

PIECE = 128  # of the tokens, that a program makes


@dataclass
class Place:
    """Where a recording looks for a step's inputs: room for just so many tokens.

    `inbox` int32 [n] is the work of the first kind of layer, with some room behind it.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    inbox: torch.Tensor


def nowhere(tokens: int, sequences: int) -> Place | None:
    """There is no recording."""
    return None


class _Step:
    """A plan's numbers int32 [sequences], and which sequences are to be sampled."""

    def __init__(self, plan: StepPlan) -> None:
        sequences = plan.sequences
        columns = [[s.slot for s in sequences], [s.start for s in sequences]]
        numbers = np.array([*columns, [s.count for s in sequences]], np.int32)
        self.slots, self.starts, self.counts = numbers
        self.ends = self.starts + self.counts
        self.tokens = int(self.counts.sum())
        self.sampled = [i for i, s in enumerate(sequences) if s.sample]
        self.is_decode = self.tokens == len(sequences) == len(self.sampled)

    def spread(self) -> tuple[np.ndarray, np.ndarray]:
        """Slot and position of every packed token."""
        if self.tokens == len(self.slots):
            return self.slots, self.starts
        slots, offsets = spread(self.slots, self.counts)
        return slots, np.repeat(self.starts, self.counts) + offsets

    def to_sample(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slots, ends and last packed tokens of the sequences to sample."""
        if self.is_decode:
            return self.slots, self.ends, self.counts[:0]
        some = self.sampled
        return self.slots[some], self.ends[some], (np.cumsum(self.counts, dtype=np.int32) - 1)[some]


class TritonSlots(SlotTables):
    """`SlotTables` of a model whose attention is `backend`'s.

    `place` says where a step of so many tokens and sequences has to be. A dummy's first token fills
    it up, again and again, on the block behind the last; no attention is computed for it.
    """

    def __init__(
        self,
        limits: Capabilities,
        device: torch.device,
        backend: TritonAttention,
        specs: Sequence[LayerSpec],
    ) -> None:
        super().__init__(limits, device, dummies=1)
        self._dummy = limits.max_sequences
        self.tables[self._dummy] = limits.num_blocks
        self._backend = backend
        self._specs = list({kind_of(spec): spec for spec in specs}.values())
        self.place: Callable[[int, int], Place | None] = nowhere

    def build(self, plan: StepPlan) -> StepInputs:
        step = _Step(plan)
        place = self.place(step.tokens, len(plan.sequences))
        size = step.tokens if place is None else len(place.tokens)
        packed = np.zeros((2, size), np.int32)
        packed[0] = self._dummy
        packed[:, : step.tokens] = step.spread()
        new = np.array(self._new_blocks(plan), np.int32)
        numbers = [*packed, *step.to_sample(), *new]
        divisions = self._backend.divide(step.counts, step.ends, self._specs, step.slots)
        if place is None:
            place, sent = self._anywhere(step, divisions, numbers)
        else:
            sent = self._send_to(place, divisions, numbers)
        token_slots, starts, slots, ends, last, rows, columns, blocks = sent
        if new.size:
            _write(rows, columns, blocks, self.tables)
        write_inputs[(triton.cdiv(size, PIECE),)](
            token_slots, starts, self.rows, self.tables,
            place.tokens, place.positions, place.metadata.slot_mapping,
            size, self.rows.stride(0), self.tables.stride(0), BLOCK=self._block_size, PIECE=PIECE,
        )  # fmt: skip
        return StepInputs(
            place.tokens,
            place.positions,
            place.metadata,
            step.sampled,
            None if step.is_decode else last,
            slots,
            ends,
        )

    def _anywhere(
        self, step: _Step, divisions: dict[Kind, Division], numbers: list[np.ndarray]
    ) -> tuple[Place, list[torch.Tensor]]:
        """New memory for a step, and what was sent: `numbers`."""
        tables = [division.table().ravel() for division in divisions.values()]
        sent = upload_together([*tables, *numbers], self._device)
        schedule = {
            kind: self._backend.work_of(kind, division, table.view(-1, FIELDS))
            for (kind, division), table in zip(divisions.items(), sent, strict=False)
        }
        tokens, positions, places = (
            torch.empty(step.tokens, dtype=torch.int64, device=self._device) for _ in range(3)
        )
        nothing = self.tables[:0, 0]
        metadata = AttentionMetadata(
            query_start=nothing,
            context=nothing,
            block_tables=self.tables,
            slot_mapping=places,
            block_size=self._block_size,
            counts=step.counts.tolist(),
            contexts=step.ends.tolist(),
            schedule=schedule,
        )
        return Place(tokens, positions, metadata, nothing), sent[len(tables) :]

    def _send_to(
        self, place: Place, divisions: dict[Kind, Division], numbers: list[np.ndarray]
    ) -> list[torch.Tensor]:
        """What was sent: `numbers`. The divisions' tables go to where the recording has them."""
        first, *others = (division.table().ravel() for division in divisions.values())
        _, *works = place.metadata.schedule.values()
        for table, work in zip(others, works, strict=True):
            upload(table, torch.int32, self._device, into=work.table)
        return upload_together([first, *numbers], self._device, into=place.inbox)[1:]

    def append(self, slots: torch.Tensor, ends: torch.Tensor, tokens: torch.Tensor) -> None:
        _write(slots, ends, tokens, self.rows)


def _write(
    rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, table: torch.Tensor
) -> None:
    """`table[rows, columns] = values`."""
    count = len(values)
    write_at[(triton.cdiv(count, PIECE),)](
        rows, columns, values, table, count, table.stride(0), PIECE=PIECE
    )
