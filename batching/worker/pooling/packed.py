"""Batches without padding: all texts of a batch as one row of tokens, attention text by text."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from batching.core.types import PoolRequest

ATTENTION_NAME = "slipstream_pooling"

# Keywords without effect on the result, or that are handled below.
_KNOWN = frozenset({"dropout", "scaling", "is_causal", "sliding_window", "position_ids",
                    "output_attentions", "use_cache", "cache_position"})  # fmt: skip


class CannotPackError(ValueError):
    """The model asks its attention for something that is not done here."""


class _Segments:
    """Where the texts of the batch lie that runs now, and the smallest window asked for."""

    bounds: Sequence[tuple[int, int]] = ()
    window: int | None = None


_segments = _Segments()


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What the model calls for attention: [1, heads, tokens, dim] in, [1, tokens, heads, dim] out.

    Each text is computed with the same shapes and strides whatever else is in the row, so its bits
    do not depend on the batch.
    """
    strange = [name for name, v in others.items() if name not in _KNOWN and v is not None]
    if strange or attention_mask is not None:
        raise CannotPackError(f"attention with {', '.join(strange) or 'a mask'}")
    if sliding_window is not None:
        _segments.window = min(sliding_window, _segments.window or sliding_window)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    outputs = []
    for start, end in _segments.bounds:
        output = nn.functional.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            scale=scaling,
            is_causal=causal and end - start > 1,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, 1), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, segment_attention)


class PackedRunner:
    """Runs a base model on packed texts. Raises `CannotPackError` if it has no such parameters."""

    name = "packed"

    def __init__(self, base: Any, first_position: int, *, has_types: bool) -> None:
        accepted = inspect.signature(base.forward).parameters
        if "position_ids" not in accepted:
            raise CannotPackError(f"{type(base).__name__} takes no position_ids")
        self._base = base
        self._first_position = first_position
        self._has_types = has_types and "token_type_ids" in accepted
        self._device = next(base.parameters()).device

    @property
    def window(self) -> int | None:
        """Longest text for which the sliding windows seen so far have no effect."""
        return _segments.window

    def hidden(self, batch: Sequence[PoolRequest]) -> list[torch.Tensor]:
        """Hidden states [length, width] of each text."""
        bounds, end = [], 0
        for request in batch:
            bounds.append((end, end + len(request.tokens)))
            end = bounds[-1][1]
        _segments.bounds = bounds
        inputs = {"input_ids": self._row([t for r in batch for t in r.tokens])}
        first = self._first_position
        inputs["position_ids"] = self._row(
            [p for r in batch for p in range(first, first + len(r.tokens))]
        )
        if self._has_types:
            inputs["token_type_ids"] = self._row([t for r in batch for t in types_of(r)])
        output = self._base(**inputs, **self._cacheless(), return_dict=True)
        row = output.last_hidden_state[0]
        return [row[start:end] for start, end in bounds]

    def _cacheless(self) -> dict[str, bool]:
        return {"use_cache": False} if hasattr(self._base.config, "use_cache") else {}

    def _row(self, values: list[int]) -> torch.Tensor:
        return torch.tensor([values], device=self._device)


def types_of(request: PoolRequest) -> list[int]:
    """The token types of a text: 0, and 1 for the second text of a pair."""
    count = len(request.tokens)
    first = count if request.second is None else request.second
    return [0] * first + [1] * (count - first)
