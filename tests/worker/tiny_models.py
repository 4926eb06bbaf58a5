"""Seeded float32 models of many architectures, small enough to run in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 128
MAX_LEN = 128
WINDOW = 8
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
BOTH_WINDOWS = {
    "num_hidden_layers": 3,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EXPERTS = {"num_experts_per_tok": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": MAX_LEN // 4,
}

# Wide enough for the C++ decoder's vectors.
WIDE = {"hidden_size": 64, "head_dim": 32}

# Name: (model class, arguments of its configuration besides COMMON)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": WINDOW, "head_dim": 16}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, **BOTH_WINDOWS}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama_wide": ("Llama", {"rope_parameters": YARN, **WIDE}),
    "mistral_wide": ("Mistral", {"sliding_window": WINDOW, **WIDE}),
    "qwen2_wide": ("Qwen2", {"use_sliding_window": True, **BOTH_WINDOWS, **WIDE}),
    "qwen3_wide": ("Qwen3", {"tie_word_embeddings": True, **WIDE}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
            **BOTH_WINDOWS,
        },
    ),
    "gemma3": ("Gemma3", {"head_dim": 16, "query_pre_attn_scalar": 24, **BOTH_WINDOWS}),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2", {}),
    "gpt2": ("GPT2", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, **EXPERTS}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8, **EXPERTS},
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "head_dim": 16, **EXPERTS, **BOTH_WINDOWS}),
    "granite": ("Granite", {"logits_scaling": 3.0, "attention_multiplier": 0.2}),
    "cohere2": ("Cohere2", {"logit_scale": 0.5, **BOTH_WINDOWS}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            **EXPERTS,
        },
    ),
}


def build(name: str, **overrides: Any) -> Any:
    """A model of that architecture, seeded random weights, in eval mode, with eager attention."""
    prefix, arguments = ARCHITECTURES[name]
    config_class = getattr(transformers, f"{prefix}TextConfig", None)
    config_class = config_class or getattr(transformers, f"{prefix}Config")
    model_class = getattr(transformers, f"{prefix}ForCausalLM", None)
    model_class = model_class or getattr(transformers, f"{prefix}LMHeadModel")
    config = config_class(**{**COMMON, **arguments, **overrides})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(config).eval()
    for parameter in model.parameters():
        # Whatever an architecture starts with (zeros, ones), every parameter must matter.
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def save(name: str, folder: Path, **overrides: Any) -> Path:
    """Write such a model to `folder` as safetensors, and return the folder."""
    build(name, **overrides).save_pretrained(folder)
    return folder
