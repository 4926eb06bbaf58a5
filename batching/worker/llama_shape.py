"""Models of Llama's shape, whose layers we compute ourselves: on CPUs in C++, on GPUs in Triton."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

# Decoder layers whose forward, in the plain configuration, is exactly the one computed.
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
# By `model_type` of the configuration, what transformers makes of it.
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class Shape(NamedTuple):
    """The numbers that such models differ in."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int  # dimensions of a head that are rotated


@dataclass
class LayerWeights:
    """One layer's, each as torch's linear layers have it: [outputs, inputs]."""

    qkv: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...] | None  # of these three
    output: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None


@dataclass
class LlamaWeights:
    """A model's. What `layers` yields, once, need not last longer than until the next."""

    layers: Iterable[LayerWeights]
    count: int
    vocab_size: int
    intermediate: int
    embedding: torch.Tensor
    head: torch.Tensor  # the embedding itself where they are tied
    final_norm: torch.Tensor
    epsilon: float
    cos: torch.Tensor  # float32 [positions, rotary / 2]
    sin: torch.Tensor


def refuses(model: Any) -> str | None:
    """Why a model that transformers loaded is not of that shape, or None."""
    layers = list(getattr(model.base_model, "layers", ()))
    kinds = {type(layer).__name__ for layer in layers}
    if not kinds or kinds - set(LAYERS):
        return f"its layers are {', '.join(sorted(kinds)) or 'not in a list'}"
    attention, mlp = layers[0].self_attn, layers[0].mlp
    plain = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj, model.lm_head)
    if any(type(linear) is not nn.Linear for linear in (attention.q_proj, *plain)):
        return "its projections are not plain linear layers"
    if any(linear.bias is not None for linear in plain):
        return "its output, feed-forward or head projections have biases"
    if model.config.hidden_act != "silu":
        return f"its activation is {model.config.hidden_act}"
    return None


def shape(model: Any) -> Shape:
    """That of a model which `refuses` does not refuse."""
    attention, config = model.base_model.layers[0].self_attn, model.config
    return Shape(
        config.hidden_size,
        config.intermediate_size,
        attention.q_proj.out_features // attention.head_dim,
        attention.k_proj.out_features // attention.head_dim,
        attention.head_dim,
        2 * _rotary(model, 1)[0].shape[1],
    )


def weights(model: Any, positions: int) -> LlamaWeights:
    """Those of such a model, which loses each layer's when the next is asked for."""
    base = model.base_model
    return LlamaWeights(
        _layers(model),
        len(base.layers),
        model.config.vocab_size,
        model.config.intermediate_size,
        base.embed_tokens.weight,
        model.lm_head.weight,
        base.norm.weight,
        base.norm.variance_epsilon,
        *_rotary(model, positions),
    )


def empty(module: nn.Module) -> None:
    """Drop the parameters' memory; what is still needed of it has another owner."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


def _layers(model: Any) -> Iterator[LayerWeights]:
    for layer in model.base_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        yield LayerWeights(
            qkv=tuple(linear.weight for linear in projections),
            biases=None if attention.q_proj.bias is None else tuple(p.bias for p in projections),
            output=attention.o_proj.weight,
            gate=mlp.gate_proj.weight,
            up=mlp.up_proj.weight,
            down=mlp.down_proj.weight,
            input_norm=layer.input_layernorm.weight,
            post_norm=layer.post_attention_layernorm.weight,
            query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
            key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        )
        empty(layer)


def _rotary(model: Any, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines float32 [positions, rotary / 2], as the model computes them."""
    embedding = model.base_model.rotary_emb
    cos, sin = embedding(torch.empty(1), torch.arange(positions)[None])
    half = cos.shape[-1] // 2  # the second half repeats the first
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
