"""What assembly asks of a model: facts before its KV pages exist, and steps when they do."""

from __future__ import annotations

from typing import Protocol

import torch

from batching.worker.attention import AttentionBackend, AttentionMetadata, LayerSpec

Pages = list[tuple[torch.Tensor, torch.Tensor]]


class Runner(Protocol):
    """Computes steps. Owns no per-request state."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory."""

    def hidden(
        self, tokens: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """Last hidden states [tokens, width] of packed tokens int64 [tokens].

        The next call may overwrite the result.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Raw logits float32 [n, vocabulary] of hidden states [n, width].

        The caller may change them; the next call may overwrite them.
        """

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same in the format that they are computed in. Not to be changed."""

    def largest(self, hidden: torch.Tensor) -> torch.Tensor:
        """`largest(logits(hidden))` int64 [n], where nothing else is wanted of the logits."""


class Loaded(Protocol):
    """A model that was found, and checked as far as that goes without pages."""

    architecture: str
    vocab_size: int
    dtype: torch.dtype
    max_model_len: int
    end_tokens: tuple[int, ...]
    specs: list[LayerSpec]
    step_bytes: int  # that the largest step takes on an accelerator

    def bind(self, backend: AttentionBackend, pages: Pages) -> Runner:
        """The fastest runner that computes the model exactly. Called once."""
