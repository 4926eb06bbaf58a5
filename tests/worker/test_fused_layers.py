"""Fused layers against transformers' own: the same logits, and the tokens of `generate()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from batching.worker import load
from batching.worker.device import choose_device
from batching.worker.fused_layers import FusedLayer, fuse
from batching.worker.model import PackedModel
from batching.worker.protocol import WorkerConfig
from batching.worker.quantized import QuantizedLinear
from batching.worker.torch_worker import TorchWorker
from tests.worker import tiny_models
from tests.worker.harness import Harness
from tests.worker.interpreting import make_interpreting_cheap
from tests.worker.test_architectures import Case, check, generate, serve
from tests.worker.test_quantized import serve as serve_near
from tests.worker.test_triton_attention import DTYPES

DEVICE = choose_device("auto")
NAMES = ["llama", "mistral", "qwen2", "qwen3"]
ROWS = (2, 16)  # summed, and where they are of 16 bits multiplied by tensor cores
NEW_TOKENS = 4

pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # rows that nobody asked for


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "has_triton", lambda device: True)
    make_interpreting_cheap(monkeypatch)


def layers_of(worker: TorchWorker) -> list[Any]:
    model: Any = worker._model
    model = getattr(model, "_model", model)  # of recordings, on a GPU
    assert isinstance(model, PackedModel)
    return list(model.model.base_model.layers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    models = []
    for is_fused in (False, True):
        model = tiny_models.build(name, initializer_range=0.1).to(dtype)
        assert not is_fused or fuse(model)
        model.set_attn_implementation("sdpa")
        models.append(model.to(DEVICE))
    tolerance = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.06}[dtype]
    tokens = torch.arange(2 * 17, device=DEVICE).view(2, 17) % tiny_models.VOCAB
    for some in (tokens, *(tokens[:1, :count] for count in ROWS)):
        with torch.inference_mode():
            expected, got = (model(some, use_cache=False).logits.float() for model in models)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    sizes = [sum(p.nbytes for p in model.parameters()) for model in models]
    assert sizes[0] == sizes[1]


@pytest.fixture(scope="module", params=NAMES)
def case(request: Any, tmp_path_factory: Any) -> Case:
    folder = tiny_models.save(request.param, tmp_path_factory.mktemp(request.param))
    model = tiny_models.build(request.param)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (1, 3, 12)]
    return Case(folder, [generate(model, prompt, NEW_TOKENS) for prompt in prompts])


def worker_of(folder: Path, **settings: Any) -> TorchWorker:
    limits = {"dtype": "float32", "block_size": 4, "num_blocks": 160, "max_sequences": 8}
    return TorchWorker(WorkerConfig(str(folder), **{"max_step_tokens": 256, **limits, **settings}))


@pytest.mark.parametrize("attention", ["triton", "auto"])  # on a CPU, auto has pages of its own
def test_tokens_are_those_of_generate(attention: str, case: Case) -> None:
    worker = worker_of(case.folder, attention=attention)
    assert {type(layer) for layer in layers_of(worker)} == {FusedLayer}
    outcomes = serve(Harness(worker, max_step_tokens=8), case.expected)
    for outcome, expected in zip(outcomes, case.expected, strict=True):
        check(outcome, expected)
    worker.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("qwen3", tmp_path_factory.mktemp("qwen3"), initializer_range=0.05)


@pytest.fixture
def workers(folder: Path, request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With the settings asked for: fused, and not."""
    fused = worker_of(folder, attention="triton", **request.param)
    monkeypatch.setattr(load, "has_triton", lambda device: False)
    return fused, worker_of(folder, attention="triton", **request.param)


@pytest.mark.parametrize(
    "workers", [{"quantization": "int8"}, {"kv_cache_dtype": "fp8"}], indirect=True
)
def test_with_quantized_weights_and_pages(workers: Any) -> None:
    fused, plain = workers
    for outcome, expected in zip(serve_near(fused), serve_near(plain), strict=True):
        entry = expected.logprobs[0]
        near = dict(outcome.logprobs[0].top)
        assert near[entry.token] == pytest.approx(entry.logprob, abs=0.02)


def test_merged_products_are_quantized(folder: Path) -> None:
    worker = worker_of(folder, attention="triton", quantization="int8")
    layer = layers_of(worker)[0]
    found = {type(part) for part in (layer.qkv, layer.output, layer.gate_up, layer.down)}
    assert found == {QuantizedLinear}
    worker.close()


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("gemma2", {}),
        ("gpt2", {}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"hidden_act": "gelu"}),
    ],
)
def test_other_models_stay_as_they_are(name: str, overrides: dict[str, Any]) -> None:
    model = tiny_models.build(name, **overrides)
    before = [type(module) for module in model.modules()]
    assert not fuse(model)
    assert [type(module) for module in model.modules()] == before
