"""Tiny encoders, classifiers and decoders with seeded weights, and what they give by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from batching.core.types import PoolRequest

VOCABULARY = 300
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
DECODER = {"num_key_value_heads": 2, "head_dim": 16}

# Name: (config class, model class prefix, arguments besides COMMON)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {"type_vocab_size": 2}),
    "roberta": ("Roberta", {"type_vocab_size": 1}),
    "xlm_roberta": ("XLMRoberta", {"type_vocab_size": 1}),
    "distilbert": ("DistilBert", {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}),
    "mpnet": ("MPNet", {}),
    "electra": ("Electra", {"embedding_size": 64, "type_vocab_size": 2}),
    "deberta": ("DebertaV2", {"type_vocab_size": 2, "relative_attention": True,
                              "pos_att_type": ["p2c", "c2p"]}),
    "modernbert": ("ModernBert", {"local_attention": 16, "global_attn_every_n_layers": 2}),
    "qwen3": ("Qwen3", DECODER),
    "llama": ("Llama", DECODER),
    "gemma2": ("Gemma2", {**DECODER, "sliding_window": 64, "attn_logit_softcapping": 5.0}),
}  # fmt: skip


def build(name: str, suffix: str, **overrides: Any) -> Any:
    """A model with random weights that all matter, in eval mode."""
    prefix, arguments = MODELS[name]
    config_class = getattr(transformers, f"{prefix}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}{suffix}")(
        config_class(**{**COMMON, **arguments, **overrides})
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def save(folder: Path, model: Any, pooling: str | None = None, **bert: Any) -> Path:
    """Write the model; with `pooling` also sentence-transformers' files."""
    model.save_pretrained(folder)
    if pooling is None:
        return folder
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
         "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    config = {"word_embedding_dimension": 64, f"pooling_mode_{pooling}": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(config))
    (folder / "sentence_bert_config.json").write_text(json.dumps(bert))
    return folder


def texts(count: int = 12, longest: int = 90) -> list[PoolRequest]:
    """Texts of very different lengths; every third is a pair."""
    made = []
    for i in range(count):
        length = 2 + (i * 37) % (longest - 1)
        tokens = [3 + (7 * i + 11 * j) % (VOCABULARY - 3) for j in range(length)]
        made.append(PoolRequest(str(i), "call", tokens, 0.0, length // 2 if i % 3 == 2 else None))
    return made


def alone(model: Any, request: PoolRequest, **inputs: Any) -> Any:
    """The model's own output for one text."""
    ids = torch.tensor([request.tokens])
    if (getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        second = len(request.tokens) if request.second is None else request.second
        types = [0] * second + [1] * (len(request.tokens) - second)
        inputs["token_type_ids"] = torch.tensor([types])
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs)
