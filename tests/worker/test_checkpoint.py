"""Models read without transformers: the same bits, and whatever is not plain left to it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from batching.worker.cpu import checkpoint
from batching.worker.protocol import WorkerConfig
from batching.worker.torch_worker import TorchWorker
from tests.worker import tiny_models
from tests.worker.harness import Harness, Outcome, request

DEFAULT_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5_000.0}}
FULL = {"use_sliding_window": False, "layer_types": ["full_attention"] * 3}
PLAIN: dict[str, dict[str, Any]] = {
    "llama_wide": DEFAULT_ROPE,
    "mistral_wide": {"sliding_window": None},
    "qwen2_wide": FULL,
    "qwen3_wide": {},
}


def config_of(folder: Path, **settings: Any) -> WorkerConfig:
    limits = {"device": "cpu", "max_sequences": 8, "max_step_tokens": 64, "num_blocks": 64}
    return WorkerConfig(model=str(folder), **{**limits, **settings})


def reads(folder: Path, **settings: Any) -> bool:
    return checkpoint.open_checkpoint(config_of(folder, **settings), print) is not None


def serve(folder: Path, **settings: Any) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Outcomes, and what the worker says of itself but for times."""
    worker = TorchWorker(config_of(folder, **settings))
    prompts = ([5, 9, 77, 3], [60], list(range(3, 100)))
    requests = [
        request(f"r{i}", prompt, max_tokens=12, logprobs=5) for i, prompt in enumerate(prompts)
    ]
    about = worker.capabilities()
    facts = {name: getattr(about, name) for name in about.__struct_fields__ if name != "phases"}
    return Harness(worker).run(requests), facts


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("how", [{"dtype": "float32"}, {"dtype": "bfloat16"},
                                 {"dtype": "bfloat16", "quantization": "int8"}])  # fmt: skip
def test_gives_the_bits_that_transformers_loading_gives(
    name: str, how: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models.save(name, tmp_path, **PLAIN[name])
    assert reads(folder, **how)
    here = serve(folder, **how)
    monkeypatch.setattr(checkpoint, "open_checkpoint", lambda *_: None)
    assert here == serve(folder, **how)


def test_reads_weights_in_many_files_and_other_formats(tmp_path: Path) -> None:
    model = tiny_models.build("qwen3_wide").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert reads(tmp_path / "many")
    one, many = (serve(tmp_path / name)[0] for name in ("one", "many"))
    assert one == many
    assert (
        serve(tmp_path / "one", dtype="float32")[0] == serve(tmp_path / "many", dtype="float32")[0]
    )


def test_the_older_way_to_write_a_configuration_is_the_same(tmp_path: Path) -> None:
    folder = tiny_models.save("llama_wide", tmp_path, **DEFAULT_ROPE)
    new = serve(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"], config["torch_dtype"] = None, config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    assert reads(folder)
    assert serve(folder) == new


def test_ends_texts_as_the_generation_config_says(tmp_path: Path) -> None:
    folder = tiny_models.save("qwen3_wide", tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9], "top_k": 3}')
    assert serve(folder)[1]["eos_token_ids"] == (7, 9)
    (folder / "generation_config.json").unlink()
    assert serve(folder)[1]["eos_token_ids"] == (2,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rope_parameters": tiny_models.YARN}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "scaling"),
        ({"rope_parameters": None}, "no rope_theta"),
        ({"sliding_window": 8, "use_sliding_window": True}, "windows"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"attention_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"head_dim": None}, "head_dim"),
        ({"intermediate_size": 40}, "intermediate size, 40"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
        ({"vocab_size": 127}, "unexpected shape"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "k_norm"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequence"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"auto_map": {"AutoModelForCausalLM": "own.Own"}}, "auto_map"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
    ],
)
def test_leaves_to_transformers_what_is_not_plain(
    change: dict[str, Any], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_models.save("qwen3_wide", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with caplog.at_level("INFO", logger="batching.worker"):
        assert not reads(folder)
    assert reason in caplog.text


def _without_final_norm(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.norm.weight"]


def _with_another(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(128)


def _coded(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)


@pytest.mark.parametrize("change", [_without_final_norm, _with_another, _coded])
def test_leaves_to_transformers_other_weights(
    change: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path
) -> None:
    folder = tiny_models.save("qwen3_wide", tmp_path)
    assert reads(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    assert not reads(folder)
    (folder / "model.safetensors").write_bytes(b"rubbish")
    assert not reads(folder)
    (folder / "model.safetensors").unlink()
    assert not reads(folder)


def test_leaves_to_transformers_what_is_asked_beyond_it(tmp_path: Path) -> None:
    folder = tiny_models.save("qwen3_wide", tmp_path)
    assert not reads(folder, attention="reference")
    assert not reads(folder, quantization="int4")
    assert not reads(folder, tensor_parallel=2)
    assert not reads(folder, max_model_len=tiny_models.MAX_LEN + 1)
    with pytest.raises(ValueError, match="max_model_len 129 exceeds its maximum position, 128"):
        TorchWorker(config_of(folder, max_model_len=tiny_models.MAX_LEN + 1))


def test_without_kernels_transformers_serves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models.save("qwen3_wide", tmp_path)
    fast = serve(folder, dtype="float32")[0]
    monkeypatch.setenv("PATH", "")  # no compiler
    slow, about = serve(folder, dtype="float32")
    assert about["attention"] == "reference"
    assert [o.tokens for o in slow.values()] == [o.tokens for o in fast.values()]


def test_transformers_is_not_imported() -> None:
    """Half of a start's time would go there."""
    code = (
        "import sys\n"
        "from importlib import resources\n"
        "from batching.worker.protocol import WorkerConfig\n"
        "from batching.worker.torch_worker import TorchWorker\n"
        "folder = str(resources.files('batching') / 'builtin/model')\n"
        "TorchWorker(WorkerConfig(model=folder, device='cpu', num_blocks=64))\n"
        "sys.exit('transformers' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
