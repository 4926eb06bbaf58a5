"""Weights of 8 and 4 bits on the generic path, made at load or stored so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from batching.worker import load, quantized
from batching.worker.device import choose_device
from batching.worker.protocol import UnsupportedModelError, WorkerConfig
from batching.worker.quantized import GROUP, LARGEST, QuantizedLinear, quantize
from batching.worker.quantized_kernel import multiply
from batching.worker.torch_worker import TorchWorker
from tests.worker import tiny_models
from tests.worker.harness import Harness, Outcome, request
from tests.worker.test_triton_attention import DTYPES, TOLERANCES

KINDS = ("int8", "fp8", "int4")
DEVICE = choose_device("auto")


def linear(inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "inputs, outputs, bias", [(384, 70, True), (96, 32, False), (32, 33, True)]
)
def test_the_kernel_multiplies_by_the_weights(
    kind: str, dtype: torch.dtype, inputs: int, outputs: int, bias: bool
) -> None:
    layer = QuantizedLinear(linear(inputs, outputs, dtype, bias=bias), kind).to(DEVICE)
    exact_bias = None if layer.bias is None else layer.bias.double()
    for rows in (1, 16, 17, 70):
        x = torch.randn(rows, 2 * inputs, dtype=dtype, device=DEVICE)[:, :inputs]
        got = multiply(x, layer.codes, layer.scales, layer.lows, layer.group, layer.bias)
        exact = nn.functional.linear(x.double(), layer.weight.double(), exact_bias)
        tolerance = 4 * TOLERANCES[dtype]  # the weights that we compare with are rounded
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


def test_few_and_many_rows_are_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantizedLinear(linear(64, 40, torch.float32), "int4")
    given: list[int] = []

    def note(x: torch.Tensor, *_: Any) -> torch.Tensor:
        given.append(len(x))
        return torch.empty(len(x), 40, device="meta")

    monkeypatch.setattr("batching.worker.quantized_kernel.multiply", note)
    on_device = layer.to("meta")
    shapes = [(1, 3, 64), (1, quantized.FEW_ROWS, 64), (1, quantized.FEW_ROWS + 1, 64)]
    for shape in shapes:
        assert on_device(torch.empty(shape, device="meta")).shape == (*shape[:-1], 40)
    assert given == [3, quantized.FEW_ROWS]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_err_by_half_a_step(kind: str) -> None:
    plain = linear(2 * GROUP, 24, torch.float32)
    plain.weight[3] = 0
    plain.weight[4, :GROUP] = 0.25
    layer = QuantizedLinear(plain, kind)
    error = (layer.weight - plain.weight).abs()
    if kind == "fp8":  # three bits behind the leading one
        smallest = layer.scales[:, None] * 2**-9
        assert (error <= (plain.weight.abs() * 2**-4).clamp(min=smallest / 2) * 1.001).all()
    elif kind == "int8":
        assert (error <= layer.scales[:, None] * 0.501).all()
    else:
        steps = layer.scales.repeat_interleave(GROUP, 1)
        assert (error <= steps * 0.501 + 1e-7).all()
    assert layer.weight[3].eq(0).all()
    assert kind in LARGEST or layer.weight[4, :GROUP].eq(0.25).all()


def worker_of(folder: Path, **settings: Any) -> TorchWorker:
    limits = {"max_sequences": 4, "max_step_tokens": 64, "num_blocks": 64}
    return TorchWorker(WorkerConfig(str(folder), **{**limits, **settings}))


def serve(worker: TorchWorker) -> list[Outcome]:
    prompts = [[5, 9, 77, 3, 60 + i] * (1 + i) for i in range(3)]
    asked = [request(f"r{i}", p, max_tokens=3, logprobs=5) for i, p in enumerate(prompts)]
    return list(Harness(worker).run(asked).values())


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("gemma2", tmp_path_factory.mktemp("gemma"), initializer_range=0.05)


@pytest.fixture(scope="module")
def plain(gemma: Path) -> tuple[list[Outcome], int]:
    worker = worker_of(gemma)
    return serve(worker), worker.capabilities().weight_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_stays_near_itself_and_is_smaller(
    kind: str, gemma: Path, plain: tuple[list[Outcome], int]
) -> None:
    worker = worker_of(gemma, quantization=kind)
    for outcome, exact in zip(serve(worker), plain[0], strict=True):
        first, wanted = outcome.logprobs[0], exact.logprobs[0]
        assert dict(first.top)[wanted.token] == pytest.approx(wanted.logprob, abs=0.3)
    model = tiny_models.build("gemma2")
    linears = [m.weight.nbytes for m in model.base_model.modules() if type(m) is nn.Linear]
    saved = plain[1] - worker.capabilities().weight_bytes
    assert saved > sum(linears) * (0.7 if kind != "int4" else 0.8)


def test_kinds_that_the_cpu_decoder_lacks_are_computed_without_it(tmp_path: Path) -> None:
    folder = tiny_models.save("llama_wide", tmp_path)
    names = {
        kind: type(worker_of(folder, device="cpu", quantization=kind)._model).__name__
        for kind in KINDS
    }
    assert names == {"int8": "CpuDecoder", "fp8": "PackedModel", "int4": "PackedModel"}


@pytest.mark.parametrize(
    "name, kind, overrides, reason",
    [
        ("mixtral", "fp8", {}, "mixtral: no fp8 weights for experts"),
        ("gpt2", "int8", {}, "gpt2: no int8 weights, because it has no linear layers"),
        ("llama", "int4", {"intermediate_size": 40}, "int4 .* the 40 inputs of down_proj"),
    ],
)
def test_models_that_would_stay_large_are_refused(
    name: str, kind: str, overrides: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        quantize(tiny_models.build(name, **overrides), kind)


def store(folder: Path, **described: Any) -> Path:
    """Say in the checkpoint that its weights are quantized."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": described}))
    return folder


@pytest.fixture
def stored_fp8(tmp_path: Path) -> Path:
    """A checkpoint as DeepSeek and Qwen publish them: float8 codes with a scale for each block."""
    folder = store(
        tiny_models.save("llama", tmp_path, dtype="bfloat16"),
        quant_method="fp8",
        weight_block_size=[128, 128],
        activation_scheme="dynamic",
    )
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale.float().view(1, 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_checkpoints_are_made_plain_on_a_cpu(dtype: str, stored_fp8: Path) -> None:
    got = load.load_model(
        WorkerConfig(str(stored_fp8), dtype=dtype), torch.device("cpu"), lambda *_: None
    )
    exact = tiny_models.build("llama").model.layers[1].mlp.down_proj.weight
    weight = got.model.layers[1].mlp.down_proj.weight
    assert weight.dtype == getattr(torch, dtype)
    assert 0 < (weight - exact).abs().max() < exact.abs().max() * 2**-4
    assert all(
        outcome.finish for outcome in serve(worker_of(stored_fp8, dtype=dtype, device="cpu"))
    )


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"quantization": "int8"}, r"no int8 weights, because its weights are .* already \(fp8\)"),
        ({"tensor_parallel": 2}, r"no tensor_parallel, because its weights are .* already \(fp8\)"),
    ],
)
def test_stored_codes_are_not_quantized_again_nor_divided(
    settings: dict[str, Any], reason: str, stored_fp8: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        load.load_model(
            WorkerConfig(str(stored_fp8), **settings), torch.device("cpu"), lambda *_: None
        )


@pytest.mark.parametrize(
    "described, reason",
    [
        ({"quant_method": "gptq", "bits": 4}, "optimum"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt', which transformers"),
        ({"bits": 4}, "'None', which transformers"),
    ],
)
def test_what_a_stored_quantization_lacks_is_named(
    described: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = store(tiny_models.save("llama", tmp_path), **described)
    with pytest.raises(UnsupportedModelError, match=reason):
        worker_of(folder)
