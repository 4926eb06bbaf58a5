"""Every architecture gives the tokens and logprobs of transformers' own eager generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from batching.worker.attention import BACKENDS
from batching.worker.protocol import WorkerConfig
from batching.worker.torch_worker import TorchWorker
from tests.worker import tiny_models
from tests.worker.harness import Harness, Outcome, request

NEW_TOKENS = 10
LENGTHS = (1, 3, 7, 8, 9, 20, 37)
BLOCK = 4
CPU_BACKENDS = [name for name in BACKENDS if name in ("reference", "cpu")]


@dataclass
class Expected:
    """What transformers generates for a prompt, and the logprobs [n - 1, vocab] of all tokens."""

    prompt: list[int]
    tokens: list[int]
    logprobs: torch.Tensor


@dataclass
class Case:
    folder: Path
    expected: list[Expected]


@pytest.fixture(scope="module", params=tiny_models.ARCHITECTURES)
def case(request: Any, tmp_path_factory: Any) -> Case:
    folder = tiny_models.save(request.param, tmp_path_factory.mktemp(request.param))
    model = tiny_models.build(request.param)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in LENGTHS]
    return Case(folder, [generate(model, prompt) for prompt in prompts])


@pytest.fixture(scope="module", params=CPU_BACKENDS)
def worker(request: Any, case: Case) -> Iterator[TorchWorker]:
    config = WorkerConfig(
        model=str(case.folder),
        device="cpu",
        attention=request.param,
        block_size=BLOCK,
        max_sequences=len(LENGTHS),
        max_step_tokens=256,
        num_blocks=160,
        threads=1,
    )
    worker = TorchWorker(config)
    yield worker
    worker.close()


def generate(model: Any, prompt: list[int], count: int = NEW_TOKENS) -> Expected:
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        whole = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        logits = model(whole, use_cache=False).logits[0, :-1]
    return Expected(prompt, whole[0, len(prompt) :].tolist(), logits.log_softmax(-1))


def serve(harness: Harness, expected: list[Expected]) -> list[Outcome]:
    requests = [
        request(f"r{i}", e.prompt, max_tokens=len(e.tokens), logprobs=1)
        for i, e in enumerate(expected)
    ]
    return list(harness.run(requests).values())


def check(outcome: Outcome, expected: Expected) -> None:
    assert outcome.tokens == expected.tokens
    first = len(expected.prompt) - 1
    for i, entry in enumerate(outcome.logprobs):
        assert entry.token == outcome.tokens[i]
        assert entry.rank == 1
        assert entry.logprob == pytest.approx(
            float(expected.logprobs[first + i, entry.token]), abs=1e-4
        )
    assert len(outcome.logprobs) == len(expected.tokens)


def test_alone(worker: TorchWorker, case: Case) -> None:
    for expected in case.expected:
        harness = Harness(worker, prefix_caching=False)
        check(serve(harness, [expected])[0], expected)


def test_in_a_batch_of_mixed_lengths(worker: TorchWorker, case: Case) -> None:
    harness = Harness(worker, prefix_caching=False)
    for outcome, expected in zip(serve(harness, case.expected), case.expected, strict=True):
        check(outcome, expected)
    assert max(len(plan.sequences) for plan in harness.plans) == len(LENGTHS)


def test_in_small_chunks(worker: TorchWorker, case: Case) -> None:
    harness = Harness(worker, prefix_caching=False, max_step_tokens=5)
    for outcome, expected in zip(serve(harness, case.expected), case.expected, strict=True):
        check(outcome, expected)
    assert max(plan.token_count for plan in harness.plans) <= 5


def test_with_prefix_cache_hits(worker: TorchWorker, case: Case) -> None:
    harness = Harness(worker)
    longest = case.expected[-1]
    check(serve(harness, [longest])[0], longest)
    outcomes = serve(harness, [longest, *case.expected[:3]])
    check(outcomes[0], longest)
    assert outcomes[0].cached_tokens >= len(longest.prompt) // BLOCK * BLOCK - BLOCK
    for outcome, expected in zip(outcomes[1:], case.expected[:3], strict=True):
        check(outcome, expected)


def test_after_preemption(worker: TorchWorker, case: Case) -> None:
    together = case.expected[2:]
    preemptions = 0
    for blocks in (12, 20):  # the longest sequence needs 12
        harness = Harness(worker, num_blocks=blocks, prefix_caching=False)
        for outcome, expected in zip(serve(harness, together), together, strict=True):
            check(outcome, expected)
        preemptions += harness.preemptions
    assert preemptions > 0


def test_prompt_logprobs(worker: TorchWorker, case: Case) -> None:
    expected = case.expected[-1]
    harness = Harness(worker, max_step_tokens=16)
    asked = request("r", expected.prompt, max_tokens=1, prompt_logprobs=3)
    entries = harness.run([asked])["r"].prompt_logprobs
    assert [entry.token for entry in entries] == expected.prompt[1:]
    for i, entry in enumerate(entries):
        row = expected.logprobs[i]
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        assert entry.rank == 1 + int((row > row[entry.token]).sum())
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
