"""Two keys on a real server: who floods it waits for itself. Orders are compared, not times."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.server_process import ServerProcess, running

SLOTS = 4
FLOOD = 40


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = ServerProcess(
        tmp_path_factory.mktemp("shared") / "log",
        *("--dtype", "float32", "--api-keys", "greedy,modest", "--admin-key", "operator"),
        *("--max-sequences", str(SLOTS), "--max-model-len", "512"),
    )
    with running(process):
        yield process


class Race:
    """Notes the order in which streams get their first tokens and end."""

    def __init__(self, server: ServerProcess) -> None:
        self._http = httpx.AsyncClient(base_url=server.url, timeout=120)
        self.begun: list[str] = []
        self.texts: dict[str, str] = {}

    async def run(self, key: str, number: int, tokens: int) -> None:
        fields = {
            "prompt": f"Story {number}: once upon a time", "max_tokens": tokens, "stream": True,
            "ignore_eos": True, "temperature": 0,
        }  # fmt: skip
        headers = {"authorization": f"Bearer {key}"}
        chunks = []
        async with self._http.stream(
            "POST", "/v1/completions", json=fields, headers=headers
        ) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    if not chunks:
                        self.begun.append(key)
                    chunks.append(json.loads(line.removeprefix("data: ")))
        self.texts[f"{key}{number}"] = "".join(c["choices"][0]["text"] for c in chunks)

    async def until_begun(self, count: int) -> None:
        async with asyncio.timeout(60):
            while len(self.begun) < count:
                await asyncio.sleep(0.005)


async def test_a_flood_of_one_key_is_not_ahead_of_another(shared: ServerProcess) -> None:
    race = Race(shared)
    flood = [asyncio.create_task(race.run("greedy", n, 150)) for n in range(FLOOD)]
    await race.until_begun(SLOTS)
    for number in range(3):
        before = len(race.begun)
        await race.run("modest", number, 20)
        place = race.begun[before:].index("modest")
        assert place <= SLOTS, f"{place} of the flood went first"
    assert len(race.begun) < FLOOD, "all of the flood has begun: it proves nothing"
    await asyncio.gather(*flood)
    assert len(race.texts) == FLOOD + 3
    # Whoever lost a slot for a while lost nothing else.
    alone = Race(shared)
    for number in range(SLOTS):
        await alone.run("greedy", number, 150)
        assert alone.texts[f"greedy{number}"] == race.texts[f"greedy{number}"]
    headers = {"authorization": "Bearer operator"}
    async with httpx.AsyncClient(base_url=shared.url, headers=headers) as operator:
        metrics = (await operator.get("/metrics")).text
    (preemptions,) = re.findall(r"^vllm:num_preemptions_total{.*} (\S+)$", metrics, re.M)
    assert float(preemptions) > 0
