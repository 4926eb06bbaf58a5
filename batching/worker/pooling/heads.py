"""From a text's hidden states to its numbers: pooling and dense layers, or a classifier's head.

Each works on one text at a time, so that nothing here depends on the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from batching.worker.pooling.recipe import Recipe, read_json
from batching.worker.protocol import UnsupportedModelError

Head = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""Hidden states [length, width] and token ids of a text to its numbers, float32 [size]."""

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": nn.functional.gelu,
    "Sigmoid": torch.sigmoid,
}


def _mean(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.mean(0)


def _weighted_mean(hidden: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(1, len(hidden) + 1, dtype=hidden.dtype, device=hidden.device)
    return (hidden * weights[:, None]).sum(0) / weights.sum()


_POOLING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda hidden: hidden[0],
    "max": lambda hidden: hidden.amax(0),
    "mean": _mean,
    "mean_sqrt_len_tokens": lambda hidden: hidden.sum(0) / len(hidden) ** 0.5,
    "weightedmean": _weighted_mean,
    "lasttoken": lambda hidden: hidden[-1],
}


class PoolingHead:
    """A recipe's pooling modes and dense layers."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._modes = [_POOLING[mode] for mode in recipe.modes]
        self._dense = [_load_dense(path, device) for path in recipe.dense]

    def __call__(self, hidden: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        hidden = hidden.float()
        pooled = torch.cat([mode(hidden) for mode in self._modes])
        for layer in self._dense:
            pooled = layer(pooled)
        return pooled


def _load_dense(path: Path, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    config = read_json(path / "config.json", dict)
    name = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"{path}: unknown activation {name}")
    activation = _ACTIVATIONS[name]
    if not (path / "model.safetensors").is_file():
        raise UnsupportedModelError(f"{path} holds no model.safetensors")
    weights = load_file(path / "model.safetensors", device=str(device))
    if "linear.weight" not in weights:
        raise UnsupportedModelError(f"{path} holds no linear.weight")
    weight = weights["linear.weight"].float()
    bias = weights["linear.bias"].float() if "linear.bias" in weights else None
    return lambda x: activation(nn.functional.linear(x, weight, bias))


class _GivenBase(nn.Module):
    """Takes the base model's place: returns the hidden states it was given, pooled as it would."""

    def __init__(self, pooler: nn.Module | None) -> None:
        super().__init__()
        self.pooler = pooler
        self.hidden = torch.empty(0)

    def forward(self, *_: Any, **__: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        pooled = None if self.pooler is None else self.pooler(self.hidden)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=self.hidden, pooler_output=pooled
        )


class ClassifierHead:
    """A sequence classifier's own `forward` after its base model. Shares all weights with it."""

    def __init__(self, model: Any) -> None:
        prefix = model.base_model_prefix
        self._given = _GivenBase(getattr(model.base_model, "pooler", None))
        self._model = copy.copy(model)
        self._model._modules = {**model._modules, prefix: self._given}

    def __call__(self, hidden: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        self._given.hidden = hidden[None]
        ids = torch.tensor([tokens], device=hidden.device)
        logits: torch.Tensor = self._model(input_ids=ids).logits[0]
        return logits.float()
