"""Keys and values kept in float8: both backends that can, and what becomes of those that cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from batching.worker import attention_triton
from batching.worker.attention import AttentionBackend, choose_backend, to_stored
from batching.worker.attention_reference import ReferenceAttention
from batching.worker.attention_triton import TritonAttention
from batching.worker.device import choose_device
from batching.worker.protocol import UnsupportedModelError, WorkerConfig
from batching.worker.torch_worker import TorchWorker
from tests.conftest import HAS_GPU
from tests.worker import tiny_models
from tests.worker.harness import Harness, request
from tests.worker.paged_case import Case, spec_of
from tests.worker.test_triton_attention import DTYPES, RAGGED, SPLIT, TOLERANCES

FP8 = torch.float8_e4m3fn
DEVICE = choose_device("auto")
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # rows that nobody asked for


@pytest.fixture(params=[TritonAttention, ReferenceAttention])
def backend(request: Any, monkeypatch: pytest.MonkeyPatch) -> AttentionBackend:
    monkeypatch.setattr(attention_triton, "SPLIT_TOKENS", SPLIT)
    built: AttentionBackend = request.param(DEVICE, stored=FP8)
    return built


def on_the_grid(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Numbers that float8 has, so that nothing but their reading and writing is tested."""
    return [to_stored(part, FP8).to(part.dtype) for part in parts]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim, window", [(64, None), (72, 50), (128, None)])
def test_attention_over_float8_pages(
    backend: AttentionBackend, head_dim: int, window: int | None, dtype: torch.dtype
) -> None:
    case = Case(spec_of(4, 2, head_dim, window=window), RAGGED, dtype=dtype, device=DEVICE)
    case.key, case.value = on_the_grid(case.key), on_the_grid(case.value)
    tolerance = TOLERANCES[dtype]
    for got, expected in zip(case.run(backend), case.expected(), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double().cpu(), expected, rtol=tolerance, atol=tolerance)


def test_what_is_written_is_rounded_and_bounded(backend: AttentionBackend) -> None:
    case = Case(spec_of(2, 2, 64), [(40, 40)], device=DEVICE)
    scale = torch.logspace(-4, 3, 64, device=DEVICE)
    case.key = [part * scale for part in case.key]
    if backend.name == "triton" and not HAS_GPU:  # Triton's interpreter rounds wrongly
        case.key = on_the_grid(case.key)
    case.key[0][0, 0, :2] = torch.tensor([1e6, -1e6])
    pages = case.pages(backend)
    case.step(backend, pages, [(0, 0, 40)])
    slots = case.metadata([(0, 0, 40)]).slot_mapping
    page = pages[0] if backend.name == "reference" else pages[0].transpose(1, 2)
    written = page.flatten(0, 1)[slots].float()
    torch.testing.assert_close(written, to_stored(case.key[0], FP8).float(), rtol=0, atol=0)
    assert written[0, 0, :2].tolist() == [448, -448]


def test_pages_take_half_the_memory(backend: AttentionBackend) -> None:
    spec = spec_of(6, 3, 72)
    pages = backend.allocate(spec, 5, 16, torch.bfloat16)
    assert {page.dtype for page in pages} == {FP8}
    assert backend.page_bytes(spec, 16, torch.bfloat16) == 2 * 16 * 3 * 72
    assert sum(page.nbytes for page in pages) == 5 * backend.page_bytes(spec, 16, torch.bfloat16)


def test_the_cpu_kernels_leave_it_to_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    spec = spec_of(4, 2, 64)
    assert choose_backend("auto", CPU, [spec], torch.float32, FP8).name == "reference"
    assert "not cpu: keeps no keys and values in float8_e4m3fn" in caplog.text
    with pytest.raises(UnsupportedModelError, match="cpu: keeps no keys and values in float8"):
        choose_backend("cpu", CPU, [spec], torch.float32, FP8)


def test_gpus_without_float8_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "has_fp8", lambda device: False)
    with pytest.raises(UnsupportedModelError, match="triton: keeps no keys and values in float8"):
        choose_backend("triton", DEVICE, [spec_of(4, 2, 64)], torch.float32, FP8)


@pytest.mark.parametrize("attention", ["reference", "triton"])
def test_a_model_stays_near_itself_and_holds_twice_the_tokens(
    attention: str, tmp_path: Path
) -> None:
    folder = tiny_models.save("qwen3", tmp_path, initializer_range=0.05)
    found = {}
    for kind in ("auto", "fp8"):
        config = WorkerConfig(
            str(folder),
            dtype="float16",
            attention=attention,
            kv_cache_dtype=kind,
            max_sequences=4,
            max_step_tokens=64,
            kv_cache_gib=1 / 1024,
        )
        worker = TorchWorker(config)
        asked = [
            request(f"r{i}", [5, 9, 77, 3, 60 + i] * (1 + i), max_tokens=3, logprobs=5)
            for i in range(3)
        ]
        found[kind] = worker.capabilities(), Harness(worker).run(asked)
        worker.close()
    (exact, wanted), (half, got) = found["auto"], found["fp8"]
    assert (exact.kv_dtype, half.kv_dtype) == ("float16", "float8_e4m3fn")
    assert half.num_blocks == 2 * exact.num_blocks
    for name, outcome in got.items():
        entry = wanted[name].logprobs[0]
        near = dict(outcome.logprobs[0].top)
        assert near[entry.token] == pytest.approx(entry.logprob, abs=0.1)
        assert near[entry.token] != entry.logprob
