"""The grammars of the slots, and each step's mask. Costs nothing while there are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from batching.core.types import SlotInit
from batching.worker.device import upload
from batching.worker.grammar import Grammars, Matcher, fill_rows
from batching.worker.protocol import Capabilities
from batching.worker.sampling import (
    Mask,
    SamplingInputs,
    apply_mask,
    largest,
    sample,
    sample_again,
)


class StepGrammars:
    """The matchers of one step's sampled rows that have a grammar, and what they said."""

    def __init__(self, matchers: dict[int, Matcher], words: int) -> None:
        """`matchers` by row, in their order."""
        self._matchers = matchers
        self._words = words
        self._pending = True  # the step's tokens are still to be accepted
        self.gave_up: list[int] = []  # rows

    def choose(self, logits: torch.Tensor, how: SamplingInputs) -> torch.Tensor:
        """Sample int64 [n] where waiting for tokens costs nothing.

        Most that a model says its grammar allows, and asking is much cheaper than a mask: only
        those that are not allowed are drawn again, under a mask. Greedy, and where the whole
        vocabulary is drawn from, the tokens are those of a mask from the start.
        """
        ruled = [row for row, matcher in self._matchers.items() if matcher.has_rules]
        if ruled:
            how.mask = self.mask(logits.device, ruled)
        tokens = sample(logits, how)
        said = tokens.tolist()
        for row in ruled:
            self._matchers[row].accept(said[row])
        wrong = [
            row
            for row, matcher in self._matchers.items()
            if not (matcher.has_rules or matcher.try_accept(said[row]))
        ]
        if wrong:
            apply_mask(logits, self.mask(logits.device, wrong))
            sample_again(logits, how, wrong, tokens)
            said = tokens.tolist()
            for row in wrong:
                self._matchers[row].accept(said[row])
        self._pending = False
        return tokens

    def correct(
        self, tokens: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Replace those of greedy `tokens` int64 [n] that are not allowed, where that is known.

        What `choose` does where nothing but the largest logits was computed; `logits_of` gives
        those of some rows.
        """
        said = tokens.tolist()
        wrong = [
            row
            for row, matcher in self._matchers.items()
            if matcher.has_rules or not matcher.try_accept(said[row])
        ]
        if wrong:
            mask = self.mask(tokens.device, wrong)
            logits = logits_of(mask.rows)
            apply_mask(logits, Mask(torch.arange(len(wrong)), mask.bits))
            tokens[mask.rows] = found = largest(logits)
            for row, token in zip(wrong, found.tolist(), strict=True):
                self._matchers[row].accept(token)
        self._pending = False

    def mask(self, device: torch.device, rows: list[int] | None = None) -> Mask:
        """What may come next in `rows` (all). Those that gave up are masked by nothing."""
        rows = list(self._matchers) if rows is None else rows
        bits = np.empty((len(rows), self._words), dtype=np.int32)
        for i in fill_rows([self._matchers[row] for row in rows], bits):
            bits[i] = -1
            self.gave_up.append(rows[i])
        return Mask(upload(rows, torch.int64, device), upload(bits, torch.int32, device))

    def accept(self, tokens: Sequence[int]) -> None:
        """Take in what was sampled for all rows of the step, if it was not known before."""
        if self._pending:
            for row, matcher in self._matchers.items():
                matcher.accept(tokens[row])


class GrammarSlots:
    """Matchers by slot."""

    def __init__(self, capabilities: Capabilities) -> None:
        self._grammars = Grammars(
            capabilities.model, capabilities.vocab_size, capabilities.eos_token_ids
        )
        self._matchers: dict[int, Matcher] = {}
        self._words = 0

    def begin(self, init: SlotInit) -> None:
        """Replace what was known of the slot; a resumed sequence's matcher catches up."""
        if init.params.grammar is None:
            self._matchers.pop(init.slot, None)
            return
        matcher, self._words = self._grammars.matcher(init.params), self._grammars.words
        for token in init.tokens[init.prompt_length :]:
            matcher.accept(token)
        self._matchers[init.slot] = matcher

    def step(self, slots: Sequence[int]) -> StepGrammars | None:
        """The grammars among the rows to sample, which belong to `slots`."""
        if not self._matchers:
            return None
        found = map(self._matchers.get, slots)
        matchers = {row: matcher for row, matcher in enumerate(found) if matcher is not None}
        return StepGrammars(matchers, self._words) if matchers else None
