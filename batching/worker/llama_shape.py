"""Models of Llama's shape, whose layers we compute ourselves: on CPUs in C++, on GPUs in Triton."""

from __future__ import annotations

from typing import Any

from torch import nn

# Decoder layers whose forward, in the plain configuration, is exactly the one computed.
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


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
