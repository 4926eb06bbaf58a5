"""Model and hardware files: sizes that are known, estimates that follow from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batching.core.step_time import StepLoad
from loadtest.twin.hardware import (
    HardwareError,
    estimated_limits,
    estimated_step_time,
    hardware_names,
    load_hardware,
    load_profile,
)
from loadtest.twin.model_card import ModelCard, ModelError, load_card
from tests.meta.tree import ROOT

LLAMA_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
    "intermediate_size": 28672,
}  # fmt: skip
MIXTRAL = LLAMA_8B | {"vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}
DEEPSEEK_V3 = {
    "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "vocab_size": 129280, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 163840, "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip


def card(folder: Path, config: dict[str, Any], **how: Any) -> ModelCard:
    (folder / "config.json").write_text(json.dumps(config))
    return load_card(str(folder), **how)


@pytest.mark.parametrize(
    ("config", "billions", "active", "kv_bytes"),
    [
        (LLAMA_8B, 8.03, 7.50, 131_072),
        (LLAMA_70B, 70.6, 69.5, 327_680),
        (MIXTRAL, 46.7, 12.7, 131_072),
        (DEEPSEEK_V3, 671.0, 36.6, 70_272),
    ],
)
def test_known_models_have_their_known_sizes(
    tmp_path: Path, config: dict[str, Any], billions: float, active: float, kv_bytes: int
) -> None:
    found = card(tmp_path, config)
    assert found.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert found.active_parameters / 1e9 == pytest.approx(active, rel=0.02)
    assert found.kv_bytes_per_token == kv_bytes


def test_the_built_in_models_weights_are_its_files() -> None:
    found = load_card("")
    size = (ROOT / "batching/builtin/model/model.safetensors").stat().st_size
    assert found.weight_bytes == pytest.approx(size, rel=0.01)


def test_number_formats(tmp_path: Path) -> None:
    assert card(tmp_path, LLAMA_8B).weight_bits == 16
    assert card(tmp_path, LLAMA_8B, quantization="int8").weight_bits == 8.25
    assert card(tmp_path, LLAMA_8B, quantization="int4").weight_bits == 4.25
    awq = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    assert card(tmp_path, LLAMA_8B | awq).weight_bits == 4.25
    assert card(tmp_path, LLAMA_8B | {"torch_dtype": "float32"}).weight_bits == 32
    assert card(tmp_path, DEEPSEEK_V3).weight_bits == 8


def test_few_tokens_touch_few_experts(tmp_path: Path) -> None:
    found = card(tmp_path, MIXTRAL)
    assert found.weights_read(1) == pytest.approx(2 * found.active_parameters, rel=0.01)
    table = found.vocab * found.hidden
    assert found.weights_read(10_000) == pytest.approx(2 * (found.parameters - table), rel=0.01)


@pytest.mark.parametrize(
    ("content", "named"),
    [("{}", "hidden_size"), ("[]", "config"), ("{", "config"),
     (json.dumps(LLAMA_8B | {"quantization_config": {"quant_method": "odd"}}), "odd")],
)  # fmt: skip
def test_configs_that_do_not_say(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=named):
        load_card(str(tmp_path))


def test_no_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        load_card(str(tmp_path))


@pytest.mark.parametrize("name", hardware_names())
def test_hardware_files_are_plausible_and_name_their_sources(name: str) -> None:
    found = load_hardware(name)
    assert 1e11 < found.flops < 1e16 and 1e9 < found.bandwidth < 2e13
    assert 1e9 < found.memory < 1e12 and 0 < found.price_per_hour < 50
    assert {source.split(":")[0].split(",")[0] for source in found.sources} >= {"price"}
    assert any("flops" in source for source in found.sources)
    assert 0 < found.flops_share <= 1 and 0 < found.bandwidth_share <= 1


def test_unknown_hardware_and_broken_files_are_named(tmp_path: Path) -> None:
    assert {"h200", "h100", "a100", "l4", "rtx4090"} <= set(hardware_names())
    with pytest.raises(HardwareError, match="known: a100"):
        load_hardware("abacus")
    path = tmp_path / "x.yaml"
    path.write_text("name: x\n")
    with pytest.raises(HardwareError, match="x.yaml"):  # noqa: RUF043
        load_hardware(str(path))
    with pytest.raises(HardwareError, match="profile"):
        load_profile(tmp_path / "none.json")


def test_a_decode_step_reads_the_weights_and_a_prefill_computes(tmp_path: Path) -> None:
    model, h100 = card(tmp_path, LLAMA_8B), load_hardware("h100")
    time = estimated_step_time(model, h100)
    weights = 2 * model.active_parameters / (h100.bandwidth * h100.bandwidth_share)
    assert time.seconds(StepLoad(1, 1, 100, 0)) == pytest.approx(weights, rel=0.15)
    compute = 2 * 7e9 * 4096 / (h100.flops * h100.flops_share)
    assert time.seconds(StepLoad(4096, 1, 0, 1)) == pytest.approx(compute, rel=0.1)
    two = estimated_step_time(model, h100, devices=2)
    assert two.seconds(StepLoad(4096, 1, 0, 1)) < 0.6 * time.seconds(StepLoad(4096, 1, 0, 1))


def test_blocks_are_what_memory_leaves(tmp_path: Path) -> None:
    model, h100 = card(tmp_path, LLAMA_8B), load_hardware("h100")
    limits = estimated_limits(model, h100)
    assert limits is not None
    kv = limits.num_blocks * limits.block_size * model.kv_bytes_per_token
    assert 50e9 < kv < 0.9 * h100.memory - model.weight_bytes
    big = card(tmp_path, LLAMA_70B)
    assert estimated_limits(big, h100) is None
    assert estimated_limits(big, h100, devices=4) is not None
