"""A model's size from its `config.json` alone: parameters, KV bytes, what a step must read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from config import __file__ as _config_file

BUILTIN = Path(_config_file).parent.parent / "batching" / "builtin" / "model"
# Bits of a weight that the server quantizes, with its share of the scales.
QUANTIZED_BITS = {"int8": 8.25, "fp8": 8.25, "int4": 4.25}


class ModelError(ValueError):
    """The folder has no config.json, or it does not say what is needed."""


class ModelCard(msgspec.Struct, frozen=True):
    """What capacity depends on. Parameters are counted, bytes follow from the number format."""

    name: str
    layers: int
    hidden: int
    intermediate: int  # of the MLP that a token passes through
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    parameters: int
    active_parameters: int  # that one token uses, without the embedding's lookup
    head_parameters: int  # of these, the LM head
    expert_parameters: int  # of all experts together, 0 without
    experts: int
    experts_used: int
    weight_bits: float
    kv_bytes_per_token: int

    @property
    def weight_bytes(self) -> float:
        """Memory that the weights take."""
        return self.parameters * self.weight_bits / 8

    def weights_read(self, rows: int) -> float:
        """Bytes of weights that a step of `rows` tokens reads: of experts, those that are hit by
        any token, if tokens choose them independently."""
        dense = self.active_parameters
        touched = 0.0
        if self.experts:
            share = self.experts_used / self.experts
            dense -= round(self.expert_parameters * share)
            touched = self.expert_parameters * (1 - (1 - share) ** rows)
        return (dense + touched) * self.weight_bits / 8


def context_of(card: ModelCard, asked: int | None) -> int:
    """The tokens of a sequence that were asked for, by default all. Raises `ModelError`."""
    if asked is not None and asked > card.context:
        raise ModelError(f"{asked} tokens exceed the model's context of {card.context}")
    return asked or card.context


def load_card(model: str, quantization: str = "none", kv_bits: int = 16) -> ModelCard:
    """From a folder with a config.json (or that file itself); empty is the built-in model.

    Raises `ModelError`.
    """
    path = Path(model) if model else BUILTIN
    path = path if path.suffix == ".json" else path / "config.json"
    try:
        text = json.loads(path.read_bytes())
        # A model with images or sound keeps the language model's numbers apart.
        config = text | text.get("text_config", {})
        return _card(path.resolve().parent.name, config, quantization, kv_bits)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no model's config: {error}") from error
    except KeyError as error:
        raise ModelError(f"{path} does not say {error.args[0]}") from error


def _card(name: str, config: Mapping[str, Any], quantization: str, kv_bits: int) -> ModelCard:
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    heads, vocab = int(config["num_attention_heads"]), int(config["vocab_size"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    attention = _attention(config, hidden, heads, kv_heads, head_dim)
    experts = int(_first(config, "num_local_experts", "num_experts", "n_routed_experts") or 0)
    used = int(config.get("num_experts_per_tok") or 0) if experts else 0
    dense = int(_first(config, "intermediate_size") or 4 * hidden)
    width = int(config.get("moe_intermediate_size") or dense) if experts else dense
    plain_layers = min(int(config.get("first_k_dense_replace") or 0), layers) if experts else layers
    shared = int(config.get("n_shared_experts") or 0) * width
    shared += int(config.get("shared_expert_intermediate_size") or 0)
    one_expert = 3 * hidden * width
    all_experts = one_expert * experts * (layers - plain_layers)
    head = vocab * hidden
    table = 0 if config.get("tie_word_embeddings", False) else head
    body = layers * attention + plain_layers * 3 * hidden * dense
    body += (layers - plain_layers) * (3 * hidden * shared + hidden * experts)
    return ModelCard(
        name=name,
        layers=layers,
        hidden=hidden,
        intermediate=width * max(used, 1) + shared,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        context=int(config.get("max_position_embeddings") or 2048),
        parameters=body + all_experts + head + table,
        active_parameters=body + one_expert * used * (layers - plain_layers) + head,
        head_parameters=head,
        expert_parameters=all_experts,
        experts=experts,
        experts_used=used,
        weight_bits=_bits(config, quantization),
        kv_bytes_per_token=_kv_values(config, layers, kv_heads, head_dim) * kv_bits // 8,
    )


def _attention(
    config: Mapping[str, Any], hidden: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """Parameters of one layer's attention."""
    rank = config.get("kv_lora_rank")
    if rank is None:
        return 2 * hidden * head_dim * (heads + kv_heads)
    # Latent attention (DeepSeek): queries and KV through low-rank factors.
    nope, rope = int(config["qk_nope_head_dim"]), int(config["qk_rope_head_dim"])
    value, query_rank = int(config["v_head_dim"]), config.get("q_lora_rank")
    query = heads * (nope + rope)
    queries = hidden * query if not query_rank else query_rank * (hidden + query)
    latent = hidden * (rank + rope) + rank * heads * (nope + value)
    return int(queries + latent + heads * value * hidden)


def _kv_values(config: Mapping[str, Any], layers: int, kv_heads: int, head_dim: int) -> int:
    """Numbers that the KV cache keeps of a token. Windows are not taken off: an upper bound."""
    if config.get("kv_lora_rank") is not None:
        return layers * (int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"]))
    return 2 * layers * kv_heads * head_dim


def _bits(config: Mapping[str, Any], quantization: str) -> float:
    """Bits of a weight, with its share of the scales."""
    if quantization in QUANTIZED_BITS:
        return QUANTIZED_BITS[quantization]
    found = config.get("quantization_config") or {}
    method = str(found.get("quant_method", ""))
    if method in {"gptq", "awq"}:
        return float(found.get("bits", 4)) + 0.25
    if method == "mxfp4":
        return 4.25
    if "fp8" in method:
        return 8.0
    if found:
        raise ModelError(f"quantization {method or 'of unknown kind'!r} is not known here")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return 32.0 if dtype == "float32" else 16.0


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)
