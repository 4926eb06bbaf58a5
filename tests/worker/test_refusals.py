"""What cannot be served exactly is refused at load, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from batching.worker.load import choose_dtype
from batching.worker.probe import Probe
from batching.worker.protocol import UnsupportedModelError, WorkerConfig
from batching.worker.torch_worker import TorchWorker
from tests.worker import tiny_models

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def load(folder: Path, **settings: Any) -> TorchWorker:
    return TorchWorker(
        WorkerConfig(**{"model": str(folder), "device": "cpu", "max_sequences": 2, **settings})
    )


def refused(model: Any, folder: Path, pattern: str) -> None:
    model.save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match=pattern):
        load(folder, max_model_len=64)


def test_recurrent_models(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    refused(transformers.MambaForCausalLM(config), tmp_path, "mamba.*state|mamba.*layers")


def test_hybrid_linear_attention(tmp_path: Path) -> None:
    config = transformers.Qwen3NextConfig(
        **SMALL, layer_types=["linear_attention", "full_attention"], num_experts=2, head_dim=8
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="qwen3_next: layers of type linear_attention"):
        load(tmp_path)


def test_encoder_decoders(tmp_path: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load(tmp_path)


def test_alibi(tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    refused(transformers.BloomForCausalLM(config), tmp_path, "bloom: .*attention")


def test_shared_keys_and_values(tmp_path: Path) -> None:
    config = transformers.Gemma3nTextConfig(num_hidden_layers=4, num_kv_shared_layers=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="num_kv_shared_layers"):
        load(tmp_path)


def test_chunked_attention(tmp_path: Path) -> None:
    config = transformers.Llama4TextConfig(
        **SMALL, layer_types=["chunked_attention", "full_attention"], num_local_experts=2
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="layers of type chunked_attention"):
        load(tmp_path)


@pytest.mark.parametrize(
    "asked, pattern",
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "causality"),
        ({"sliding_window": 5}, "window is 5, but its mask shows"),
    ],
)
def test_unknown_requests_of_attention(
    asked: dict[str, Any], pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.build("llama")
    record = Probe._attention

    def attention(self: Probe, *args: Any, **keywords: Any) -> Any:
        return record(self, *args, **{**keywords, **asked})

    monkeypatch.setattr(Probe, "_attention", attention)
    with pytest.raises(UnsupportedModelError, match=pattern):
        Probe(model, 64)


@pytest.mark.parametrize(
    "mask", [lambda b, h, q, k: k <= q + 1, lambda b, h, q, k: k // 8 == q // 8]
)
def test_masks_that_are_no_window(mask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("llama")
    record = Probe._mask
    monkeypatch.setattr(
        Probe, "_mask", lambda self, **given: record(self, **{**given, "mask_function": mask})
    )
    with pytest.raises(UnsupportedModelError, match="mask neither causal nor a sliding window"):
        Probe(model, 64)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "qwen2", "gpt_oss", "llama"])
def test_windows_are_those_of_the_configuration(name: str) -> None:
    model = tiny_models.build(name)
    types = getattr(model.config, "layer_types", None)
    default = "sliding_attention" if name == "mistral" else "full_attention"
    types = types or [default] * model.config.num_hidden_layers
    expected = [tiny_models.WINDOW if kind == "sliding_attention" else None for kind in types]
    assert [spec.window for spec in Probe(model, tiny_models.MAX_LEN).specs] == expected


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}


@pytest.mark.parametrize(
    "name, rope, limit", [("phi3", LONGROPE, 32), ("llama", DYNAMIC, tiny_models.MAX_LEN)]
)
def test_length_dependent_rope_is_served_only_where_it_is_constant(
    name: str, rope: dict[str, Any], limit: int, tmp_path: Path
) -> None:
    tiny_models.save(name, tmp_path, rope_parameters=rope, original_max_position_embeddings=32)
    assert load(tmp_path).capabilities().max_model_len == limit
    with pytest.raises(UnsupportedModelError, match=f"exceeds .*{limit}"):
        load(tmp_path, max_model_len=limit + 1)


def test_a_checkpoint_with_absent_weights(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 weights.*up_proj"):
        load(tmp_path)


def test_pickled_weights_only_when_allowed(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="cannot load"):
        load(tmp_path)
    assert load(tmp_path, allow_pickle=True).capabilities().dtype == "float32"


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot load"):
        load(tmp_path)


def test_a_pool_too_small_for_one_sequence(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"room for 64 tokens.*max_model_len to 64"):
        load(tmp_path, num_blocks=2, block_size=32)
    assert load(tmp_path, num_blocks=2, max_model_len=64).capabilities().num_blocks == 2


def test_a_block_size_that_the_backend_cannot_lay_out(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path)
    with pytest.raises(UnsupportedModelError, match="block_size 3"):
        load(tmp_path, block_size=3, dtype="bfloat16", attention="cpu")


@pytest.mark.parametrize("is_fast, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_automatic_dtype_on_the_cpu(
    is_fast: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batching.worker.device.has_fast_bfloat16", lambda device: is_fast)
    config = transformers.LlamaConfig(dtype="bfloat16")
    assert choose_dtype("auto", config, torch.device("cpu")) == expected
    assert choose_dtype("float16", config, torch.device("cpu")) == torch.float16
    stored = transformers.LlamaConfig(dtype="float32")
    assert choose_dtype("auto", stored, torch.device("cpu")) == torch.float32
