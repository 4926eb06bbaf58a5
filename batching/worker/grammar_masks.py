"""The grammars of the slots, and each step's mask. Costs nothing while there are none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from batching.core.types import SlotInit
from batching.worker.grammar import Grammars, Matcher
from batching.worker.protocol import Capabilities
from batching.worker.sampling import Mask


class StepGrammars:
    """The matchers of one step's sampled rows that have a grammar, and what they said."""

    def __init__(self, rows: dict[int, Matcher]) -> None:
        self._rows = rows
        self.gave_up: list[int] = []  # rows

    def mask(self, words: int, device: torch.device) -> Mask:
        """What may come next. Rows that gave up are masked by nothing."""
        bits = np.full((len(self._rows), words), -1, dtype=np.int32)
        for i, (row, matcher) in enumerate(self._rows.items()):
            if not matcher.fill(bits[i]):
                bits[i] = -1
                self.gave_up.append(row)
        rows = torch.tensor(list(self._rows), dtype=torch.int64, device=device)
        return Mask(rows, torch.from_numpy(bits).to(device, non_blocking=True))

    def accept(self, tokens: Sequence[int]) -> None:
        """Take in what was sampled for all rows of the step."""
        for row, matcher in self._rows.items():
            matcher.accept(tokens[row])


class GrammarSlots:
    """Matchers by slot."""

    def __init__(self, capabilities: Capabilities) -> None:
        self._grammars = Grammars(
            capabilities.model, capabilities.vocab_size, capabilities.eos_token_ids
        )
        self._matchers: dict[int, Matcher] = {}

    @property
    def words(self) -> int:
        return self._grammars.words

    def begin(self, init: SlotInit) -> None:
        """Replace what was known of the slot; a resumed sequence's matcher catches up."""
        if init.params.grammar is None:
            self._matchers.pop(init.slot, None)
            return
        matcher = self._grammars.matcher(init.params)
        matcher.accept(*init.tokens[init.prompt_length :])
        self._matchers[init.slot] = matcher

    def step(self, slots: Sequence[int]) -> StepGrammars | None:
        """The grammars among the rows to sample, which belong to `slots`."""
        if not self._matchers:
            return None
        rows = {i: self._matchers[slot] for i, slot in enumerate(slots) if slot in self._matchers}
        return StepGrammars(rows) if rows else None
