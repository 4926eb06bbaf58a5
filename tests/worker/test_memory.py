"""What fits, by memory readers of our own; and refusals that say by how much it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from batching.worker import load, transformers_model
from batching.worker.kv_pool import GIB, choose_num_blocks
from batching.worker.model import PackedModel
from batching.worker.protocol import UnsupportedModelError, WorkerConfig
from batching.worker.torch_worker import TorchWorker
from batching.worker.warm_up import largest_steps
from tests.worker import tiny_models

BLOCK_BYTES = 1 << 20


def blocks(free: int, step: int, max_model_len: int = 64, **config: Any) -> int:
    asked = WorkerConfig("m", block_size=16, **config)
    return choose_num_blocks(asked, max_model_len, BLOCK_BYTES, free, step, is_cpu=False)


def test_the_pool_takes_what_the_largest_step_leaves() -> None:
    assert blocks(10 * GIB, 0) == 9 * 1024
    assert blocks(10 * GIB, 2 * GIB) == 7 * 1024
    assert blocks(10 * GIB, 2 * GIB, memory_fraction=0.5) == 3 * 1024
    assert blocks(10 * GIB, 2 * GIB, num_blocks=5) == 5


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        blocks(2 * GIB, GIB, max_model_len=1 << 20)
    said = str(refusal.value)
    assert "room for 13104 tokens (0.80 GiB of 2.00 GiB free" in said
    assert "of which the largest step takes 1.00" in said
    assert "max_model_len 1048576 needs 64.00 GiB: set max_model_len to 13104 or less" in said
    with pytest.raises(UnsupportedModelError, match=r"room for 0 tokens \(0.00 GiB of 1.00 GiB"):
        blocks(GIB, 3 * GIB)


def test_weights_that_do_not_fit_are_refused_with_numbers() -> None:
    model = torch.nn.Linear(1 << 14, 1 << 14, bias=False, device="meta")
    load.refuse_too_large("big", model, GIB)
    with pytest.raises(UnsupportedModelError, match=r"'big' take 1.00 GiB, and 0.50 GiB of"):
        load.refuse_too_large("big", model, GIB // 2)


def test_the_dry_run_is_a_largest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build("qwen3")
    packed = PackedModel(model)
    rows: list[int] = []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return torch.empty(len(hidden), tiny_models.VOCAB)

    monkeypatch.setattr(packed, "logits", logits)
    config = WorkerConfig("m", max_sequences=300, max_step_tokens=500)
    with torch.inference_mode():
        probe = transformers_model.largest_step(model, packed, 64, config)
    assert (probe._tokens, rows) == (63, [300])  # of each of eight sequences


def test_the_largest_steps_are_what_the_limits_say(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path)
    config = WorkerConfig(str(folder), device="cpu", max_sequences=7, max_step_tokens=300)
    worker = TorchWorker(config)
    limits = worker.capabilities()
    prompts, decodes = largest_steps(limits)
    assert prompts.token_count == 300
    assert decodes.token_count == len(decodes.sequences) == 7
    for plan in (prompts, decodes):
        assert max(s.start + s.count for s in plan.sequences) <= limits.max_model_len
        result = worker.wait(worker.submit(plan))
        assert len(result.tokens) == len(result.logprobs) == 7
    worker.close()
