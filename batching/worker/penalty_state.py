"""Token counts of the sequences that ask for penalties, kept up incrementally on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from batching.core.types import SlotInit
from batching.worker.device import upload


class PenaltyState:
    """Counts int32 [capacity, vocab] and prompt membership bool [capacity, vocab], by entry.

    Only slots that ask hold an entry; the capacity doubles when entries run out.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self.counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self.in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._entries: dict[int, int] = {}
        self._free: list[int] = []

    def begin(self, init: SlotInit) -> None:
        """Count a sequence's tokens afresh into the slot's entry, taking one if it has none."""
        if init.slot not in self._entries:
            if not self._free:
                self._grow()
            self._entries[init.slot] = self._free.pop()
        entry = self._entries[init.slot]
        tokens = upload(init.tokens, torch.int64, self._device)
        prompt, generated = tokens[: init.prompt_length], tokens[init.prompt_length :]
        self.in_prompt[entry] = False
        self.in_prompt[entry, prompt] = True
        self.counts[entry] = 0
        ones = torch.ones_like(generated, dtype=torch.int32)
        self.counts[entry].index_put_((generated,), ones, accumulate=True)

    def end(self, slot: int) -> None:
        """Give back the slot's entry, if it has one."""
        entry = self._entries.pop(slot, None)
        if entry is not None:
            self._free.append(entry)

    def entries(self, slots: Sequence[int]) -> torch.Tensor:
        """Entries int64 [n] of slots that hold one."""
        return upload([self._entries[slot] for slot in slots], torch.int64, self._device)

    def add(self, entries: torch.Tensor, tokens: torch.Tensor) -> None:
        """Count one generated token for each of some distinct entries; both int64 [n]."""
        self.counts[entries, tokens] += 1

    def _grow(self) -> None:
        capacity, added = len(self.counts), max(1, len(self.counts))
        self.counts = torch.cat([self.counts, self.counts.new_zeros(added, self.counts.shape[1])])
        self.in_prompt = torch.cat(
            [self.in_prompt, self.in_prompt.new_zeros(added, self.in_prompt.shape[1])]
        )
        self._free = list(range(capacity, capacity + added))
