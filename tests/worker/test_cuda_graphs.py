"""Recorded steps against plain ones. Without a GPU a "recording" is the pass itself, repeated."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batching.worker import assemble, cuda_graphs, load, sampler_state, sampling
from batching.worker.attention_triton import TritonAttention
from batching.worker.cuda_graphs import GraphedModel, Pass, Recording
from batching.worker.device import choose_device
from batching.worker.protocol import Capabilities, WorkerConfig
from batching.worker.torch_worker import TorchWorker
from tests.worker import tiny_models
from tests.worker.harness import Harness, Outcome, request
from tests.worker.interpreting import make_interpreting_cheap
from tests.worker.paged_case import spec_of

pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # rows that nobody asked for
SIZES = [*((size, False) for size in (1, 2, 4, 8)), (8, True), (16, True)]
LIMITS = {"num_blocks": 40, "block_size": 4, "max_sequences": 5, "max_step_tokens": 24}


class Repeater:
    """Stands for `cuda_graphs.Recorder`: computes again into the same memory."""

    def __call__(self, run: Pass) -> Recording:
        output = run()
        return lambda: output.copy_(run()), output  # type: ignore[func-returns-value]


def serve(worker: TorchWorker, **limits: Any) -> dict[str, Outcome]:
    prompts = [[5 + i, 9, 77, 3, 60 + i][: 1 + i % 5] * (1 + i) for i in range(6)]
    sampled = {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.3, "logprobs": 1}
    params = [{}, sampled, {"prompt_logprobs": 0}, {}, sampled, {}]
    requests = [
        request(f"r{i}", prompt, max_tokens=3 + i, seed=i, **rest)
        for i, (prompt, rest) in enumerate(zip(prompts, params, strict=True))
    ]
    return Harness(worker, **limits).run(requests)


@pytest.fixture(scope="module", params=["qwen3", "gemma2", "gpt_oss"])
def folder(request: Any, tmp_path_factory: Any) -> Path:
    return tiny_models.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def graphed(folder: Path) -> Iterator[TorchWorker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs, "SIZES", (1, 2, 4, 8))
        patch.setattr(cuda_graphs, "LARGE_SIZES", (16, 1024))
        patch.setattr(cuda_graphs, "LEAST_MIXED", 8)
        if choose_device("auto").type == "cpu":
            patch.setattr(assemble, "GRAPHED", ("cpu",))
            patch.setattr(cuda_graphs, "Recorder", Repeater)
            for module in (load, sampling, sampler_state):
                patch.setattr(module, "has_triton", lambda device: True)
        make_interpreting_cheap(patch)
        # On a GPU, torch's grouped products wait for the device in other dtypes than bfloat16.
        waits = choose_device("auto").type != "cpu" and folder.name.startswith("gpt_oss")
        dtype = "bfloat16" if waits else "float32"
        worker = TorchWorker(WorkerConfig(str(folder), attention="triton", dtype=dtype, **LIMITS))
        yield worker
        worker.close()


def test_recorded_steps_give_the_same_tokens(graphed: TorchWorker, folder: Path) -> None:
    model = graphed._model
    assert isinstance(model, GraphedModel)
    assert sorted(model._recordings) == sorted(SIZES)
    used = []
    for key, (replay, output) in model._recordings.items():
        model._recordings[key] = partial(_noting, used, key, replay), output
    dtype = graphed.capabilities().dtype
    reference = TorchWorker(WorkerConfig(str(folder), attention="reference", dtype=dtype, **LIMITS))
    got, expected = serve(graphed), serve(reference)
    assert set(used) > {(2, False), (4, False), (16, True)}
    for name, outcome in expected.items():
        assert len(got[name].tokens) == len(outcome.tokens)
        assert dtype != "float32" or got[name].tokens == outcome.tokens
        assert len(got[name].prompt_logprobs) == len(outcome.prompt_logprobs)
    reference.close()


def _noting(used: list[Any], key: Any, replay: Any) -> None:
    used.append(key)
    replay()


def test_steps_go_to_the_next_recorded_size(graphed: TorchWorker) -> None:
    model = graphed._model
    assert isinstance(model, GraphedModel)

    def size(tokens: int, sequences: int) -> int | None:
        place = model.place(tokens, sequences)
        return None if place is None else len(place.tokens)

    assert [size(n, n) for n in range(1, 6)] == [1, 2, 4, 4, 8]
    assert [size(tokens, 2) for tokens in (3, 8, 15, 16, 17)] == [8, 8, 16, 16, None]


def test_large_sizes_are_for_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host would take longer to launch a pass than the GPU to compute it."""
    monkeypatch.setattr(cuda_graphs, "SIZES", (16, 512))
    monkeypatch.setattr(cuda_graphs, "LARGE_SIZES", (640, 1024, 1280))
    device, spec = choose_device("auto"), spec_of(2, 1, 16)
    backend = TritonAttention(device)
    backend.allocate(spec, 1, 4, torch.float32)
    limits = Capabilities("", "", 9, 64, 9, 4, 5, 1100, dtype="", device="", attention="")
    for operations, largest in ((1e9, 1024), (8.5e9, 640), (1.6e10, 512), (1.4e11, 512)):
        model: Any = SimpleNamespace(token_operations=operations)
        made = GraphedModel(model, backend, [spec], limits, torch.zeros(6, 16, device=device))
        made._recordings = made._places  # type: ignore[assignment]
        place = made.place(largest, 2)
        assert place is not None and len(place.tokens) == largest
        assert made.place(largest + 1, 2) is None


def test_a_model_that_waits_for_the_device_is_not_recorded(
    graphed: TorchWorker, caplog: pytest.LogCaptureFixture
) -> None:
    model = graphed._model
    assert isinstance(model, GraphedModel)
    tried = []

    def refuse(run: Pass) -> Recording:
        tried.append(run)
        raise RuntimeError("called a synchronizing operation\nlong story")

    model.record(refuse)
    assert len(tried) == 1
    assert "no CUDA graphs: called a synchronizing operation" in caplog.messages
    assert model.place(3, 3) is None
    one = request("r", [5, 6, 7], max_tokens=2)
    assert len(Harness(graphed).run([one])["r"].tokens) == 2
