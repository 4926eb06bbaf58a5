"""Two ranks on a CPU against one: the same tokens, and no process left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from batching.worker.parallel import ParallelWorker
from batching.worker.protocol import UnsupportedModelError, WorkerConfig, WorkerError
from batching.worker.torch_worker import TorchWorker
from tests.e2e.server_process import exists
from tests.worker import tiny_models
from tests.worker.harness import Harness, request

LIMITS = {"num_blocks": 40, "block_size": 4, "max_sequences": 4, "max_step_tokens": 32}
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.4, "logprobs": 2}
KINDS: list[dict[str, Any]] = [{}, SAMPLED, {"prompt_logprobs": 1, "logprobs": 0}]


def config(folder: Path, size: int, **settings: Any) -> WorkerConfig:
    settings = {**LIMITS, "dtype": "float32", "threads": 2, **settings}
    return WorkerConfig(str(folder), device="cpu", tensor_parallel=size, **settings)


@pytest.fixture(scope="module", params=["qwen3", "mixtral"])
def folder(request: Any, tmp_path_factory: Any) -> Path:
    return tiny_models.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Iterator[ParallelWorker]:
    threads = torch.get_num_threads()
    worker = ParallelWorker(config(folder, 2))
    yield worker
    worker.close()
    torch.set_num_threads(threads)


def test_two_ranks_give_the_tokens_of_one(ranks: ParallelWorker, folder: Path) -> None:
    asked = [
        request(f"r{i}", [7, 9, 77, 3, 60, 61, i][: 1 + i % 7] * (1 + i % 3 * 2),
                max_tokens=9 + i, seed=i, **KINDS[i % 3])
        for i in range(7)
    ]  # fmt: skip
    one = TorchWorker(config(folder, 1))
    for limits in ({}, {"num_blocks": 14}):
        expected = Harness(one, **limits).run(asked)
        got = Harness(ranks, **limits).run(asked)
        for name, outcome in expected.items():
            assert got[name].tokens == outcome.tokens
            pairs = zip(
                [*got[name].logprobs, *got[name].prompt_logprobs],
                [*outcome.logprobs, *outcome.prompt_logprobs],
                strict=True,
            )
            for entry, wanted in pairs:
                assert entry.token == wanted.token
                assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)
    one.close()


def test_each_rank_holds_its_share(ranks: ParallelWorker, folder: Path) -> None:
    one = TorchWorker(config(folder, 1))
    whole, share = one.capabilities(), ranks.capabilities()
    assert share.kv_bytes * 2 == whole.kv_bytes
    assert whole.weight_bytes / 2 < share.weight_bytes < whole.weight_bytes
    assert share.num_blocks == whole.num_blocks
    one.close()


def test_a_lost_rank_is_an_error_and_leaves_nothing(ranks: ParallelWorker) -> None:
    (rank,) = ranks._ranks
    os.kill(rank._process.pid, signal.SIGKILL)
    with pytest.raises(WorkerError):
        Harness(ranks).run([request("r", [1, 2, 3], max_tokens=5)])
    ranks.close()
    assert not exists(rank._process.pid)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_shares_are_quantized_as_the_whole(kind: str, tmp_path: Path) -> None:
    # Heads and feed-forward so wide that a rank has whole groups of int4.
    wide = {"head_dim": 64, "intermediate_size": 256, "attention_bias": True}
    tiny_models.save("qwen3", tmp_path, **wide)
    asked = [request(f"r{i}", [7, 9, 77, i], max_tokens=9, logprobs=2) for i in range(3)]
    # Not by the C++ decoder, which rounds activations too.
    one = TorchWorker(config(tmp_path, 1, quantization=kind, attention="reference"))
    expected = Harness(one).run(asked)
    ranks = ParallelWorker(config(tmp_path, 2, quantization=kind))
    try:
        got = Harness(ranks).run(asked)
        whole, share = one.capabilities(), ranks.capabilities()
    finally:
        ranks.close()
    one.close()
    for name, outcome in expected.items():
        assert got[name].tokens == outcome.tokens
        for entry, wanted in zip(got[name].logprobs, outcome.logprobs, strict=True):
            assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)
    assert share.weight_bytes < 0.7 * whole.weight_bytes


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path / "llama")
    with pytest.raises(UnsupportedModelError, match="num_attention_heads, 4, do not divide by"):
        ParallelWorker(config(tmp_path / "llama", 3))
    tiny_models.save("gpt2", tmp_path / "gpt2")
    with pytest.raises(UnsupportedModelError, match="tp_plan"):
        ParallelWorker(config(tmp_path / "gpt2", 2))
    tiny_models.save("phi3", tmp_path / "phi3")
    with pytest.raises(UnsupportedModelError, match="phi3: no fp8 weights with tensor_parallel"):
        ParallelWorker(config(tmp_path / "phi3", 2, quantization="fp8"))
