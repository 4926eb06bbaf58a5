"""`--tensor-parallel 2` on a CPU: the text of one process, also when a rank is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import openai
import pytest

from tests.bench.servers import tree
from tests.e2e.server_process import ServerProcess, running

PROMPTS = ["Once upon a time", "The sum of 3 and 4 is", "A list of colours:"]


@pytest.fixture
def divided(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = ServerProcess(
        tmp_path_factory.mktemp("ranks") / "log",
        *("--dtype", "float32", "--served-model-name", "slipstream-tiny"),
        *("--tensor-parallel", "2", "--max-model-len", "512"),
    )
    with running(process):
        yield process


def rank_of(server: ServerProcess) -> int:
    """The process of the second rank."""
    ranks = []
    for pid in tree(server.process.pid):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"batching.worker.parallel" in file.read():
                ranks.append(pid)
    (rank,) = ranks
    return rank


def test_ranks_serve_the_same_text_and_are_replaced(
    client: openai.OpenAI, divided: ServerProcess
) -> None:
    ranks = openai.OpenAI(base_url=f"{divided.url}/v1", api_key="none", timeout=180)

    def ask(asked: openai.OpenAI, prompt: str, tokens: int) -> str:
        text = ""
        stream = asked.completions.create(
            model="slipstream-tiny",
            prompt=prompt,
            max_tokens=tokens,
            temperature=0.0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for chunk in stream:
            text += chunk.choices[0].text
            if tokens > 100 and text and killed == [0]:
                killed[0] = rank_of(divided)
                os.kill(killed[0], signal.SIGKILL)
        return text

    kept = ranks.completions.create(
        model="slipstream-tiny",
        prompt=PROMPTS[0],
        max_tokens=20,
        temperature=0.0,
        extra_body={"structured_outputs": {"choice": ["zebra", "quartz"]}},
    )
    assert kept.choices[0].text in ("zebra", "quartz")
    killed = [-1]
    for prompt in PROMPTS:
        assert ask(ranks, prompt, 24) == ask(client, prompt, 24)
    expected = ask(client, PROMPTS[0], 200)
    killed = [0]
    assert ask(ranks, PROMPTS[0], 200) == expected
    assert killed[0] > 0
    assert rank_of(divided) != killed[0]
