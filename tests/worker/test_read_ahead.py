"""Weights read while the start goes on: the model that transformers loads, bit by bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from batching.worker import assemble, load, read_ahead
from batching.worker.load import load_model
from batching.worker.protocol import UnsupportedModelError, WorkerConfig
from batching.worker.read_ahead import ReadAhead
from batching.worker.stored import stored_tensors
from batching.worker.torch_worker import TorchWorker
from tests.worker import tiny_models
from tests.worker.harness import Harness, request
from tests.worker.interpreting import make_interpreting_cheap

CPU = torch.device("cpu")
KINDS = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of many pieces, the last of them shorter."""
    monkeypatch.setattr(read_ahead, "PIECE", 1000)


def begin(folder: Path, **settings: Any) -> ReadAhead | None:
    return read_ahead.read_ahead(WorkerConfig(str(folder), **settings), CPU)


def both(folder: Path, **settings: Any) -> tuple[Any, Any]:
    """The model with its weights read ahead, which must be taken, and as transformers loads it."""
    config = WorkerConfig(str(folder), **settings)
    ahead = begin(folder, **settings)
    assert ahead is not None
    model = load_model(config, CPU, print, ahead)
    ahead.finish(lambda *_: None)
    memory = {tensor.untyped_storage().data_ptr() for tensor in ahead.tensors.values()}
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == memory
    assert len(memory) == 1
    return model, load_model(config, CPU, print)


def check_same(one: Any, other: Any) -> None:
    for kind in ("named_parameters", "named_buffers"):
        tensors, expected = (dict(getattr(model, kind)()) for model in (one, other))
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name]), name
            assert not tensor.requires_grad
    assert [type(module) for module in one.modules()] == [
        type(module) for module in other.modules()
    ]
    assert (one.training, one.dtype) == (other.training, other.dtype)
    assert one.config.to_dict() == other.config.to_dict()
    assert one.generation_config.eos_token_id == other.generation_config.eos_token_id


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_gives_the_model_that_transformers_loads(
    name: str, is_fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "has_triton", lambda device: is_fused)
    check_same(*both(tiny_models.save(name, tmp_path)))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("served", ["auto", "float32", "bfloat16"])
def test_converts_and_reads_many_files(stored: torch.dtype, served: str, tmp_path: Path) -> None:
    model = tiny_models.build("qwen3", num_hidden_layers=11).to(stored)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    check_same(*both(tmp_path, dtype=served))


@pytest.mark.parametrize("attention", ["triton", "reference"])
def test_serves_the_same_tokens(
    attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models.save("qwen2", tmp_path)
    monkeypatch.setattr(load, "has_triton", lambda device: True)
    make_interpreting_cheap(monkeypatch)
    limits = {"max_sequences": 4, "max_step_tokens": 32, "num_blocks": 64}
    config = WorkerConfig(str(folder), attention=attention, **limits)  # type: ignore[arg-type]
    requests = [request(f"r{n}", list(range(3, 4 + n)), max_tokens=2) for n in (1, 5)]
    with monkeypatch.context() as without:
        without.setattr(assemble, "read_ahead", lambda *_: None)
        expected = Harness(TorchWorker(config)).run(requests)
    monkeypatch.setattr(assemble, "HOSTS", ())
    taken: list[bool] = []
    monkeypatch.setattr(ReadAhead, "fill", _noting(ReadAhead.fill, taken))
    worker = TorchWorker(config)
    assert taken == [True]
    assert sys.getswitchinterval() > read_ahead.SWITCH
    assert Harness(worker).run(requests) == expected


def _noting(method: Callable[..., bool], results: list[bool]) -> Callable[..., bool]:
    def called(*arguments: Any) -> bool:
        results.append(method(*arguments))
        return results[-1]

    return called


def _without_a_norm(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.norm.weight"]


def _wider(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = torch.ones(tiny_models.VOCAB, 40)


def _with_another(weights: dict[str, torch.Tensor]) -> None:
    weights["model.rotary_emb.inv_freq"] = torch.ones(4)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (_without_a_norm, "lacks 1 weights of the model, such as model.norm.weight"),
        (_wider, "cannot load .* `ignore_mismatched_sizes`"),
        (_with_another, None),
    ],
)
def test_transformers_says_what_does_not_match(
    change: Callable[[dict[str, torch.Tensor]], None], refusal: str | None, tmp_path: Path
) -> None:
    folder = tiny_models.save("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config, ahead = WorkerConfig(str(folder)), begin(folder)
    assert ahead is not None
    if refusal is None:
        check_same(load_model(config, CPU, print, ahead), load_model(config, CPU, print))
    else:
        with pytest.raises(UnsupportedModelError, match=refusal):
            load_model(config, CPU, print, ahead)
    assert not ahead.tensors


def test_transformers_reads_what_is_said_wrongly(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path)
    (folder / "generation_config.json").write_text("rubbish")
    config, ahead = WorkerConfig(str(folder)), begin(folder)
    check_same(load_model(config, CPU, print, ahead), load_model(config, CPU, print))
    assert ahead is not None and not ahead.tensors


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma2"},
        {"quantization_config": {"quant_method": "fp8"}},
        {"auto_map": {"AutoModelForCausalLM": "own.Own"}},
        {"dtype": 7},
    ],
)
def test_leaves_other_models_alone(change: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert begin(folder) is None


def test_leaves_other_weights_alone(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path)
    assert begin(folder, quantization="int8") is None
    assert begin(folder, tensor_parallel=2) is None
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert begin(folder) is None
    file.write_bytes(b"rubbish")
    assert begin(folder) is None
    file.unlink()
    assert begin(folder) is None


def test_refuses_what_does_not_fit_before_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models.save("llama", tmp_path)
    monkeypatch.setattr(read_ahead, "free_bytes", lambda device: 1000)
    with pytest.raises(UnsupportedModelError, match=r"take 0.00 GiB, and 0.00 GiB of the device's"):
        begin(folder)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path)
    file = folder / "model.safetensors"
    stored = stored_tensors(folder)
    file.write_bytes(file.read_bytes()[:-1])
    ahead = ReadAhead(str(folder), stored, torch.float32, CPU)
    with pytest.raises(UnsupportedModelError, match=r"model.safetensors has become shorter"):
        ahead.finish(lambda *_: None)
