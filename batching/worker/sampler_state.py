"""Each slot's sampling parameters, and what a step's sampled rows need of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from batching.core.types import SamplingParams, SlotInit, StepPlan
from batching.worker.device import has_triton, upload, upload_together
from batching.worker.noise import MASK_64, draw_keys, mix
from batching.worker.penalty_state import PenaltyState
from batching.worker.sampling import Bias, Draws, Penalties, Restriction, SamplingInputs

GREEDY_BELOW = 1e-5  # temperatures under which sampling is greedy
# What draws need, by slot.
NUMBERS = {"random": np.bool_, "temperature": np.float32, "top_k": np.int32, "top_p": np.float32,
           "min_p": np.float32, "seed": np.uint64}  # fmt: skip
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
        self.is_penalised = bool(
            p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
        )
        # With a grammar, stop tokens that come too early are banned by its mask.
        self.bans_stops = p.min_tokens > 0 and bool(p.stop_token_ids) and p.grammar is None
        self.is_biased = bool(p.logit_bias or p.bad_words) or self.bans_stops
        self.needs = {
            name
            for name, is_needed in (
                ("draw", p.temperature >= GREEDY_BELOW),
                ("penalties", self.is_penalised),
                ("bias", self.is_biased),
                ("restriction", self.banned is not None),
                ("logprobs", p.logprobs is not None),
                ("prompt logprobs", p.prompt_logprobs is not None),
            )
            if is_needed
        }


class SamplerState:
    """Sampling parameters by slot. `inputs` turns them into tensors for one step's rows."""

    def __init__(self, vocab_size: int, device: torch.device, before: Before) -> None:
        """`before` looks up the tokens before some positions of slots (`SlotTables.before`)."""
        self._before = before
        self._vocab_size = vocab_size
        self._device = device
        self._slots: dict[int, _Slot] = {}
        # Slots by what they need, so that a step looks at no sequence for what none does.
        self._needing: defaultdict[str, set[int]] = defaultdict(set)
        self._numbers: dict[str, np.ndarray] = {n: np.zeros(1, kind) for n, kind in NUMBERS.items()}
        self._penalties = PenaltyState(vocab_size, device)
        self._penalised_rows: torch.Tensor | None = None
        self._penalised_entries: torch.Tensor | None = None

    def begin(self, init: SlotInit) -> None:
        """Replace what was known of the slot."""
        slot = _Slot(init.params, init.prompt_length, self._banned(init.params))
        self._slots[init.slot] = slot
        for needing in self._needing.values():
            needing.discard(init.slot)
        for need in slot.needs:
            self._needing[need].add(init.slot)
        for name, value in zip(NUMBERS, self._draw(init.params), strict=True):
            if init.slot >= len(self._numbers[name]):  # the rest is not read before it is set
                self._numbers[name] = np.resize(self._numbers[name], 2 * init.slot)
            self._numbers[name][init.slot] = value
        if slot.is_penalised:
            self._penalties.begin(init)
        else:
            self._penalties.end(init.slot)

    def params(self, slot: int) -> SamplingParams:
        return self._slots[slot].params

    def prompt_length(self, slot: int) -> int:
        return self._slots[slot].prompt_length

    def scores_prompts(self, plan: StepPlan) -> bool:
        """Whether a sequence of the step wants logprobs of its prompt."""
        needing = self._needing["prompt logprobs"]
        return bool(needing) and any(s.slot in needing for s in plan.sequences)

    def logprobs(self, slots: Sequence[int]) -> dict[int, int]:
        """Rows, of those that belong to `slots`, that want logprobs, and of how many top tokens."""
        if not self._is_needed("logprobs", slots):
            return {}
        found = [(row, self._slots[slot].params.logprobs) for row, slot in enumerate(slots)]
        return {row: top for row, top in found if top is not None}

    def inputs(self, slots: Sequence[int], ends: Sequence[int]) -> SamplingInputs:
        """How to sample rows that belong to `slots`, for the tokens at positions `ends`."""
        how = SamplingInputs()
        self._penalised_rows = self._penalised_entries = None
        if self._is_needed("draw", slots):
            how.draws = self._draws(slots, ends)
        if any(self._is_needed(need, slots) for need in ("penalties", "bias", "restriction")):
            states = [self._slots[slot] for slot in slots]
            how.penalties = self._penalty_inputs(slots, states)
            how.bias = self._bias(slots, states, ends)
            how.restriction = self._restriction(states)
        return how

    def _is_needed(self, need: str, slots: Sequence[int]) -> bool:
        return not self._needing[need].isdisjoint(slots)

    def record(self, tokens: torch.Tensor) -> None:
        """Count the tokens, int64 [n], just sampled for the rows of the last `inputs`."""
        if self._penalised_rows is not None:
            assert self._penalised_entries is not None
            self._penalties.add(self._penalised_entries, tokens[self._penalised_rows])

    def _penalty_inputs(self, slots: Sequence[int], states: list[_Slot]) -> Penalties | None:
        rows = [i for i, state in enumerate(states) if state.is_penalised]
        if not rows:
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

    def _draw(self, p: SamplingParams) -> tuple[bool | int | float, ...]:
        """Its `NUMBERS`."""
        top_k = p.top_k if 0 < p.top_k < self._vocab_size else self._vocab_size
        is_random = p.temperature >= GREEDY_BELOW
        return is_random, p.temperature, top_k, p.top_p, p.min_p, p.seed & MASK_64

    def _draws(self, slots: Sequence[int], ends: Sequence[int]) -> tuple[Draws, ...]:
        """Those that keep all tokens apart from the others, or, for Triton, all together."""
        of_rows = {name: numbers[slots] for name, numbers in self._numbers.items()}
        of_rows["end"] = np.array(ends)
        random = of_rows["random"]
        if has_triton(self._device):
            return (self._packed_draws(of_rows, random.nonzero()[0]),)
        limited = random & ((of_rows["top_k"] < self._vocab_size) | (of_rows["top_p"] < 1.0))
        parts = (random & ~limited).nonzero()[0], limited.nonzero()[0]
        return tuple(self._plain_draws(of_rows, rows) for rows in parts if len(rows))

    def _plain_draws(self, of_rows: dict[str, np.ndarray], rows: np.ndarray) -> Draws:
        some = {name: numbers[rows] for name, numbers in of_rows.items()}
        keys = draw_keys(some["seed"].tolist(), some["end"])
        limits = some["top_k"][some["top_k"] < self._vocab_size]
        return Draws(
            rows=self._index(rows),
            temperature=self._floats(some["temperature"]),
            keys=upload(keys, torch.int32, self._device),
            top_k=self._index(some["top_k"]) if len(limits) else None,
            top_p=self._floats(some["top_p"]) if some["top_p"].min() < 1.0 else None,
            min_p=self._floats(some["min_p"]) if some["min_p"].max() > 0.0 else None,
            max_k=int(limits.max(initial=0)),
        )

    def _packed_draws(self, of_rows: dict[str, np.ndarray], rows: np.ndarray) -> Draws:
        """In one upload, and with all limits where there is one."""
        some = {name: numbers[rows] for name, numbers in of_rows.items()}
        keeps_all = some["top_k"] == self._vocab_size
        keeps_all &= (some["top_p"] >= 1.0) & (some["min_p"] <= 0.0)
        names = ["temperature"] if keeps_all.all() else ["temperature", "top_k", "top_p", "min_p"]
        parts = [rows.astype(np.int32), mix(some["seed"], some["end"])]
        parts += [some[name] for name in names]
        where, keys, *sent = upload_together(parts, self._device)
        limits: dict[str, Any] = dict(zip(names, sent, strict=True))
        return Draws(where, keys=keys.view(-1, 2), **limits)

    def _index(self, values: list[int] | list[list[int]] | np.ndarray) -> torch.Tensor:
        return upload(values, torch.int64, self._device)

    def _floats(self, values: list[float] | np.ndarray) -> torch.Tensor:
        return upload(values, torch.float32, self._device)
