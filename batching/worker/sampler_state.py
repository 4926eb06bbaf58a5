"""Each slot's sampling parameters, and what a step's sampled rows need of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from batching.core.types import SamplingParams, SlotInit
from batching.worker.device import upload
from batching.worker.noise import draw_keys
from batching.worker.penalty_state import PenaltyState
from batching.worker.sampling import Bias, Draws, Penalties, Restriction, SamplingInputs

GREEDY_BELOW = 1e-5  # temperatures under which sampling is greedy
_BAD = -1e30  # bans a token, unless all others are impossible

Before = Callable[[Sequence[int], Sequence[int], int], torch.Tensor]


@dataclass
class _Slot:
    """A sequence's parameters, and which parts of sampling they need."""

    params: SamplingParams
    prompt_length: int
    banned: torch.Tensor | None = None  # bool [vocab]

    def __post_init__(self) -> None:
        p = self.params
        self.is_random = p.temperature >= GREEDY_BELOW
        self.is_limited = p.top_k > 0 or p.top_p < 1.0
        self.is_penalised = bool(
            p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
        )
        # With a grammar, stop tokens that come too early are banned by its mask.
        self.bans_stops = p.min_tokens > 0 and bool(p.stop_token_ids) and p.grammar is None
        self.is_biased = bool(p.logit_bias or p.bad_words) or self.bans_stops
        self.is_plain = not (
            self.is_random or self.is_penalised or self.is_biased or p.allowed_token_ids
        )


class SamplerState:
    """Sampling parameters by slot. `inputs` turns them into tensors for one step's rows."""

    def __init__(self, vocab_size: int, device: torch.device, before: Before) -> None:
        """`before` looks up the tokens before some positions of slots (`SlotTables.before`)."""
        self._before = before
        self._vocab_size = vocab_size
        self._device = device
        self._slots: dict[int, _Slot] = {}
        self._penalties = PenaltyState(vocab_size, device)
        self._penalised_rows: torch.Tensor | None = None
        self._penalised_entries: torch.Tensor | None = None

    def begin(self, init: SlotInit) -> None:
        """Replace what was known of the slot."""
        slot = _Slot(init.params, init.prompt_length, self._banned(init.params))
        self._slots[init.slot] = slot
        if slot.is_penalised:
            self._penalties.begin(init)
        else:
            self._penalties.end(init.slot)

    def params(self, slot: int) -> SamplingParams:
        return self._slots[slot].params

    def prompt_length(self, slot: int) -> int:
        return self._slots[slot].prompt_length

    def inputs(self, slots: Sequence[int], ends: Sequence[int]) -> SamplingInputs:
        """How to sample rows that belong to `slots`, for the tokens at positions `ends`."""
        states = [self._slots[slot] for slot in slots]
        if all(state.is_plain for state in states):
            self._penalised_rows = self._penalised_entries = None
            return SamplingInputs()
        free = [i for i, s in enumerate(states) if s.is_random and not s.is_limited]
        limited = [i for i, s in enumerate(states) if s.is_random and s.is_limited]
        draws = tuple(self._draws(rows, states, ends) for rows in (free, limited) if rows)
        return SamplingInputs(
            self._penalty_inputs(slots, states),
            self._bias(slots, states, ends),
            self._restriction(states),
            draws=draws,
        )

    def record(self, tokens: torch.Tensor) -> None:
        """Count the tokens, int64 [n], just sampled for the rows of the last `inputs`."""
        if self._penalised_rows is not None:
            assert self._penalised_entries is not None
            self._penalties.add(self._penalised_entries, tokens[self._penalised_rows])

    def _penalty_inputs(self, slots: Sequence[int], states: list[_Slot]) -> Penalties | None:
        rows = [i for i, state in enumerate(states) if state.is_penalised]
        if not rows:
            self._penalised_rows = self._penalised_entries = None
            return None
        self._penalised_rows = self._index(rows)
        self._penalised_entries = self._penalties.entries([slots[i] for i in rows])
        params = [states[i].params for i in rows]
        repetition = [p.repetition_penalty for p in params]
        presence = [p.presence_penalty for p in params]
        frequency = [p.frequency_penalty for p in params]
        return Penalties(
            rows=self._penalised_rows,
            entries=self._penalised_entries,
            counts=self._penalties.counts,
            in_prompt=self._penalties.in_prompt,
            repetition=self._floats(repetition) if set(repetition) != {1.0} else None,
            presence=self._floats(presence) if any(presence) else None,
            frequency=self._floats(frequency) if any(frequency) else None,
        )

    def _bias(self, slots: Sequence[int], states: list[_Slot], ends: Sequence[int]) -> Bias | None:
        rows: list[int] = []
        tokens: list[int] = []
        values: list[float] = []
        for i, state in enumerate(states):
            if not state.is_biased:
                continue
            params = state.params
            items = list(params.logit_bias)
            if state.bans_stops and ends[i] - state.prompt_length < params.min_tokens:
                items += [(token, float("-inf")) for token in params.stop_token_ids]
            rows += [i] * len(items)
            tokens += [token for token, _ in items]
            values += [value for _, value in items]
        words = [
            (i, word)
            for i, state in enumerate(states)
            for word in state.params.bad_words
            if len(word) <= ends[i] - state.prompt_length + 1
        ]
        if not rows and not words:
            return None
        added = self._floats(values)
        if words:
            added = torch.cat([added, self._ends_of_words(slots, ends, words)])
            rows += [i for i, _ in words]
            tokens += [word[-1] for _, word in words]
        return Bias(self._index(rows), self._index(tokens), added)

    def _ends_of_words(
        self, slots: Sequence[int], ends: Sequence[int], words: list[tuple[int, tuple[int, ...]]]
    ) -> torch.Tensor:
        """What is added to the logit of each word's last token: the row may have said the rest."""
        count = max(len(word) for _, word in words) - 1
        begun = self._index([[-1] * (count + 1 - len(word)) + [*word[:-1]] for _, word in words])
        rows = [i for i, _ in words]
        said = self._before([slots[i] for i in rows], [ends[i] for i in rows], count)
        completes = ((said == begun) | (begun < 0)).all(dim=1)
        return completes * _BAD

    def _banned(self, params: SamplingParams) -> torch.Tensor | None:
        if not params.allowed_token_ids:
            return None
        banned = torch.ones(self._vocab_size, dtype=torch.bool)
        banned[list(params.allowed_token_ids)] = False
        return upload(banned, torch.bool, self._device)

    def _restriction(self, states: list[_Slot]) -> Restriction | None:
        banned = {i: s.banned for i, s in enumerate(states) if s.banned is not None}
        if not banned:
            return None
        return Restriction(self._index(list(banned)), torch.stack(list(banned.values())))

    def _draws(self, rows: list[int], states: list[_Slot], ends: Sequence[int]) -> Draws:
        params = [states[i].params for i in rows]
        keys = draw_keys([p.seed for p in params], [ends[i] for i in rows])
        top_k = [p.top_k if 0 < p.top_k < self._vocab_size else self._vocab_size for p in params]
        limits = [k for k in top_k if k < self._vocab_size]
        top_p = [p.top_p for p in params]
        min_p = [p.min_p for p in params]
        return Draws(
            rows=self._index(rows),
            temperature=self._floats([p.temperature for p in params]),
            keys=upload(keys, torch.int32, self._device),
            top_k=self._index(top_k) if limits else None,
            top_p=self._floats(top_p) if min(top_p) < 1.0 else None,
            min_p=self._floats(min_p) if max(min_p) > 0.0 else None,
            max_k=max(limits, default=0),
        )

    def _index(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return upload(values, torch.int64, self._device)

    def _floats(self, values: list[float]) -> torch.Tensor:
        return upload(values, torch.float32, self._device)
