"""Batches with padding, through the model's own attention: for models that cannot be packed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from batching.core.types import PoolRequest
from batching.worker.pooling.packed import types_of

_SHORTEST_SHARE = 0.75  # of the longest text's length, in one group


class PaddedRunner:
    """Runs a base model on groups of texts of similar length, padded on the right."""

    name = "padded"

    def __init__(self, base: Any, first_position: int, *, has_types: bool) -> None:
        accepted = inspect.signature(base.forward).parameters
        self._base = base
        self._first_position = first_position
        self._has_types = has_types and "token_type_ids" in accepted
        self._has_positions = "position_ids" in accepted
        self._device = next(base.parameters()).device

    def hidden(self, batch: Sequence[PoolRequest]) -> list[torch.Tensor]:
        """Hidden states [length, width] of each text."""
        found: dict[int, torch.Tensor] = {}
        for group in groups([len(request.tokens) for request in batch]):
            states = self._run([batch[i] for i in group])
            for row, i in enumerate(group):
                found[i] = states[row, : len(batch[i].tokens)]
        return [found[i] for i in range(len(batch))]

    def _run(self, batch: Sequence[PoolRequest]) -> torch.Tensor:
        width = max(len(request.tokens) for request in batch)
        inputs = {
            "input_ids": self._rows([r.tokens for r in batch], width),
            "attention_mask": self._rows([[1] * len(r.tokens) for r in batch], width),
        }
        if self._has_types:
            inputs["token_type_ids"] = self._rows([types_of(r) for r in batch], width)
        if self._has_positions:
            first = self._first_position
            positions = torch.arange(first, first + width, device=self._device)
            inputs["position_ids"] = positions.expand(len(batch), -1)
        states: torch.Tensor = self._base(**inputs, return_dict=True).last_hidden_state
        return states

    def _rows(self, rows: list[list[int]], width: int) -> torch.Tensor:
        padded = [row + [0] * (width - len(row)) for row in rows]
        return torch.tensor(padded, device=self._device)


def groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices by length, longest first, cut where a text would be padded too much."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and lengths[i] < _SHORTEST_SHARE * lengths[group[0]]:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
