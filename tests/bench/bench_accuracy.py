"""What a form of the weights costs in accuracy, over HTTP: right answers, and perplexity.

    python -m tests.bench.bench_accuracy [MODEL] [--variants "--dtype float32" …]

Each variant is a server with these flags. The first one also writes texts, sampled at temperature 1
from random beginnings, whose perplexity all variants are then asked for. Only the built-in model
(no MODEL) can be asked held-out questions that have answers (`batching/builtin/tasks.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import shlex
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from openai import AsyncOpenAI

from batching.builtin import tasks
from loadtest.client import Client
from tests.bench.servers import Description, Server

BEGINNING, LENGTH = 8, 256  # tokens of a text
AT_ONCE = 16
T = TypeVar("T")
R = TypeVar("R")


async def _together(items: Sequence[T], work: Callable[[T], Awaitable[R]]) -> list[R]:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(item: T) -> R:
        async with gate:
            return await work(item)

    return list(await asyncio.gather(*map(one, items)))


class Variant:
    """A running server and what it is asked."""

    def __init__(self, url: str) -> None:
        self._openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)

    async def write(self, beginning: list[int]) -> list[int]:
        """A text: the beginning, and what the model makes of it."""
        answer = await self._openai.completions.create(
            model="model",
            prompt=beginning,
            max_tokens=LENGTH - BEGINNING,
            temperature=1.0,
            seed=beginning[0],
            extra_body={"return_token_ids": True},
        )
        return beginning + cast(Any, answer.choices[0]).token_ids

    async def surprise(self, text: list[int]) -> float:
        """Nats of a text without its beginning."""
        answer = await self._openai.completions.create(
            model="model", prompt=text, max_tokens=0, echo=True, logprobs=0
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.token_logprobs is not None
        return -sum(logprobs.token_logprobs[BEGINNING:])

    async def is_right(self, task: tasks.Task) -> bool:
        """Whether its greedy answer is."""
        if task.prompt is not None:
            done = await self._openai.completions.create(
                model="model", prompt=task.prompt, max_tokens=task.max_tokens, temperature=0
            )
            return task.grade(done.choices[0].text)
        said = await self._openai.chat.completions.create(
            model="model",
            messages=cast(Any, task.messages),
            max_tokens=task.max_tokens,
            temperature=0,
        )
        return task.grade(said.choices[0].message.content or "")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="")
    variants = ["--dtype float32", "--dtype bfloat16", "--quantization int8"]
    parser.add_argument("--variants", nargs="+", default=variants)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--questions", type=int, default=25, help="of each kind")
    options = parser.parse_args()
    # Calls of tools come back parsed: their grade is for text.
    kinds = [] if options.model else [kind for kind in tasks.KINDS if "tool" not in kind]
    asked = [task for kind in kinds for task in tasks.prompts(kind, options.questions, 0)]
    texts: list[list[int]] = []
    base = 0.0
    print("| variant | right | perplexity | against the first |\n|---|---|---|---|")
    for flags in options.variants:
        server, client = await _start(options.model, flags)
        try:
            variant = Variant(server.url)
            texts = texts or await _together(_beginnings(options.texts), variant.write)
            nats = await _together(texts, variant.surprise)
            right = await _together(asked, variant.is_right)
        finally:
            client.close()
            server.stop()
        perplexity = math.exp(sum(nats) / sum(len(text) - BEGINNING for text in texts))
        base = base or perplexity
        share = f"{sum(right)} of {len(right)}" if right else "–"
        print(
            f"| {flags} | {share} | {perplexity:.4f} | {perplexity / base - 1:+.2%} |", flush=True
        )


def _beginnings(count: int) -> list[list[int]]:
    source = random.Random(1)
    return [[source.randrange(10, 3000) for _ in range(BEGINNING)] for _ in range(count)]


async def _start(model: str, flags: str) -> tuple[Server, Client]:
    command = ["slipstream", "serve", *([model] if model else []),
               "--served-model-name", "model", "--port", "{port}", "--kv-cache-gib", "1",
               "--max-model-len", "2048", *shlex.split(flags)]  # fmt: skip
    log = Path(tempfile.gettempdir()) / "slipstream-accuracy.log"
    server = Server(Description(command, "/ready"), "model", Path(model), "", log)
    client = Client(server.url)
    await server.wait_healthy(client)
    return server, client


if __name__ == "__main__":
    asyncio.run(main())
