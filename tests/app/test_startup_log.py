"""The lines an operator reads while the server starts."""

from __future__ import annotations

import logging

import msgspec
import pytest

from app.startup_log import ProgressLines, log_ready, progress_log, size, startup_lines
from batching.engine.messages import Progress
from batching.worker.pool_protocol import PoolCapabilities, PoolTask
from batching.worker.protocol import Capabilities

SLOW = "x works, but: no g++ on the PATH"
CAPABILITIES = Capabilities(
    model="/models/x",
    architecture="LlamaForCausalLM",
    vocab_size=4096,
    max_model_len=2048,
    num_blocks=4096,
    block_size=32,
    max_sequences=64,
    max_step_tokens=2048,
    dtype="bfloat16",
    device="cpu",
    attention="cpu",
    weight_bytes=11 * 2**20,
    kv_bytes=3 * 2**29,
    phases={"import": 1.0, "weights": 0.52},
)


def test_the_summary_says_what_runs_where_and_how_much_fits() -> None:
    assert startup_lines({"slipstream-tiny": CAPABILITIES}, "http://127.0.0.1:8000") == [
        "model     slipstream-tiny (LlamaForCausalLM, 11.0 MiB of weights)",
        "compute   bfloat16 on cpu, cpu attention",
        "KV cache  4,096 blocks of 32 tokens hold 131,072 tokens (1.5 GiB)",
        "limits    64 sequences at once, 2,048 tokens each",
        "started   in 1.5 s: import 1.0 s, weights 0.5 s",
        "ready     http://127.0.0.1:8000",
    ]


@pytest.mark.parametrize(
    "task,size,gives",
    [
        ("embed", 384, "embeddings of 384 numbers, pooled by mean"),
        ("classify", 1, "1 label"),
        ("classify", 3, "3 labels"),
    ],
)
def test_the_summary_says_what_a_pooling_model_gives(task: PoolTask, size: int, gives: str) -> None:
    pool = PoolCapabilities(
        "m", "BertModel", task, size, 30522, 256, "float32", "cpu", "mean", "packed",
        weight_bytes=2**20,
    )  # fmt: skip
    assert startup_lines({"minilm": pool}, "http://h:1") == [
        "model     minilm (BertModel, 1.0 MiB of weights)",
        f"gives     {gives}",
        "compute   float32 on cpu, packed batches",
        "limits    256 tokens each",
        "ready     http://h:1",
    ]


def test_sizes_are_binary() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536 * 2**20, 2**51)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 GiB",
        "2048.0 TiB",
    ]


def test_progress_is_said_once_a_second() -> None:
    progress = ProgressLines()
    lines = [progress.line("weights", n / 100, 5.0 + n / 32) for n in range(101)]
    assert [line for line in lines if line is not None] == [
        "weights …",
        "weights 32%",
        "weights 64%",
        "weights 96%",
    ]
    assert progress.line("warm-up", 0.0, 8.2) == "warm-up …"


def test_all_of_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        progress_log()(Progress("of this test"))
        progress_log("minilm")(Progress("weights"))
        log_ready({"x": CAPABILITIES}, "http://h:1")
        slow = msgspec.structs.replace(CAPABILITIES, warnings=("no g++ on the PATH",))
        log_ready({"x": slow}, "http://h:1")
    said = startup_lines({"x": CAPABILITIES}, "http://h:1")
    assert caplog.messages == ["of this test …", "minilm: weights …", *said, SLOW, *said]
