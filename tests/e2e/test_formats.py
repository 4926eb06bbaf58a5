"""Weights of 4 bits with keys and values of 8, served: answers stay right, and it is said."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from batching.builtin import tasks
from tests.e2e.server_process import ServerProcess, running

QUESTIONS = 5


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = ServerProcess(
        tmp_path_factory.mktemp("formats") / "log",
        *("--quantization", "int4", "--kv-cache-dtype", "fp8", "--max-model-len", "1024"),
        *("--served-model-name", "tiny"),
    )
    with running(process):
        yield process


def test_small_formats_answer_right_and_are_named(small: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", timeout=180)
    right = []
    for task in tasks.prompts("story_completion", QUESTIONS):
        done = client.completions.create(
            model="tiny", prompt=task.prompt, max_tokens=task.max_tokens, temperature=0
        )
        right.append(task.grade(done.choices[0].text))
    assert sum(right) >= QUESTIONS - 1
    assert 'cache_dtype="float8_e4m3fn"' in small.get("/metrics")[1]
    # On a CPU, where the kernels cannot, the reference computes attention; that is no secret.
    assert "keeps no keys and values in float8_e4m3fn" in small.get("/health")[1]
    small.wait_idle()
