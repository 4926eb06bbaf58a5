"""Everything at once for a long time, on the real model: answers stay exact and memory flat.

`make soak MINUTES=20`; deselected otherwise. Faults hit the engines during the first 60 % of the
time; memory is judged after a fifth of it for the front end, and after the last fault for engines.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.chaos import Chaos
from tests.e2e.mixed_load import answer, case, stream_of
from tests.e2e.server_process import ServerProcess, running
from tests.e2e.test_chaos import LIMITS, back_to, resources
from tests.e2e.test_pooling import POOL_CHILD, embedder

MODEL = "soak"
WORKERS = 24
CASES = 60
TOKENS = 120
FAULTY_SHARE = 0.6
WARM_SHARE = 0.2
FAULT_SECONDS = 25.0
SAMPLE_SECONDS = 2.0
MIB = 1 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    process = ServerProcess(
        tmp_path / "log",
        *("--dtype", "float32", "--served-model-name", MODEL, "--also", f"minilm={embedder()}"),
        *("--restart-limit", "1000", "--num-blocks", "1024", "--max-stored-responses", "64"),
        *("--event-log", str(tmp_path / "events"), "--event-log-mib", "8"),
    )
    with running(process, ServerProcess.kill):
        yield process


class Soak:
    """A number of clients that never rest, and somebody who breaks things."""

    def __init__(self, server: ServerProcess, seconds: float) -> None:
        self._server = server
        self._began = time.monotonic()
        self._seconds = seconds
        self._random = random.Random(1)
        self._known: dict[object, Any] = {}
        self.done: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.memory: dict[str, list[tuple[float, float]]] = {"front end": [], "engine": []}
        self.client = httpx.AsyncClient(base_url=server.url, timeout=300, limits=LIMITS)

    @property
    def share(self) -> float:
        """Of the time, what has passed."""
        return (time.monotonic() - self._began) / self._seconds

    async def run(self) -> None:
        chaos = Chaos(self._server.url, MODEL, None, seed=1)
        bad = asyncio.create_task(chaos.run())
        sampling = asyncio.create_task(self._sample())
        async with self.client, asyncio.TaskGroup() as group:
            group.create_task(self._break())
            for _ in range(WORKERS):
                group.create_task(self._work())
        for task in (bad, sampling):
            task.cancel()
        assert chaos.faults == {}
        self.done.update({f"bad: {kind}": count for kind, count in chaos.counts.items()})

    async def _work(self) -> None:
        """One client: requests of every kind, of which some are given up on the way."""
        while self.share < 1:
            index = self._random.randrange(CASES)
            wanted = case(index, TOKENS)
            match self._random.randrange(10):
                case 0:
                    await self._leave(index)
                case 1:
                    await self._embed(index)
                case _:
                    stream = self._random.random() < 0.8
                    self._same(index, await answer(self.client, wanted, stream=stream))
                    self.done[wanted.path] += 1

    def _same(self, key: object, found: Any) -> None:
        """What was asked before has the same answer as then."""
        assert self._known.setdefault(key, found) == found, key

    async def _leave(self, index: int) -> None:
        events: AsyncIterator[Any] = stream_of(self.client, case(index, TOKENS))
        async for _ in events:
            if self._random.random() < 0.2:
                break
        await events.aclose()  # type: ignore[attr-defined]
        self.done["left"] += 1

    async def _embed(self, index: int) -> None:
        body = {"model": "minilm", "input": [f"text {index}", "another"]}
        response = await self.client.post("/v1/embeddings", json=body)
        assert response.status_code == 200, response.text
        self._same(("embedding", index), [e["embedding"] for e in response.json()["data"]])
        self.done["/v1/embeddings"] += 1

    async def _break(self) -> None:
        """Kill, stop and crash engines, until it is time to see whether memory stays flat."""
        while self.share < FAULTY_SHARE:
            await asyncio.sleep(FAULT_SECONDS)
            number = self._random.choice([signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
            module = self._random.choice([None, None, POOL_CHILD])
            self._server.signal_engine(number, module)
            self.faults[f"{number.name} to {'the embedder' if module else 'the engine'}"] += 1
            await asyncio.to_thread(self._server.wait_health, 503, 30)
            await asyncio.to_thread(self._server.wait_health, 200, 180)

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            now = time.monotonic() - self._began
            self.memory["front end"].append((now, rss(self._server.process.pid)))
            try:
                self.memory["engine"].append((now, rss(self._server.engine_pid())))
            except (AssertionError, OSError):  # between two engines
                pass

    def settled(self, name: str, share: float) -> dict[str, float]:
        """A process's memory after this share of the time, early and late, in MiB.

        It is the least of each half: bodies of many megabytes come and go in between.
        """
        sizes = [mib for t, mib in self.memory[name] if t > share * self._seconds]
        middle = len(sizes) // 2
        early, late = min(sizes[:middle]), min(sizes[middle:])
        return {
            "early_mib": round(early, 1),
            "late_mib": round(late, 1),
            "most_mib": round(max(sizes), 1),
            "growth": round(late / early - 1, 4),
        }


def rss(pid: int) -> float:
    """MiB of memory that a process has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / MIB


@pytest.mark.slow
@pytest.mark.timeout(0)
async def test_soak(server: ServerProcess, request: pytest.FixtureRequest) -> None:
    minutes = float(request.config.getoption("--minutes", default="20"))
    before = resources(server)
    del before["threads"]  # a pool's, which grows to its size on demand
    soak = Soak(server, minutes * 60)
    await soak.run()
    server.wait_idle()
    await back_to(server, before)
    found = {
        "minutes": minutes,
        "requests": dict(sorted(soak.done.items())),
        "faults": dict(sorted(soak.faults.items())),
        "front end": soak.settled("front end", WARM_SHARE),
        "engine": soak.settled("engine", FAULTY_SHARE + (1 - FAULTY_SHARE) / 4),
    }
    print(json.dumps(found, indent=1))
    for name in ("front end", "engine"):
        assert found[name]["growth"] < 0.05, found  # type: ignore[index]
    assert server.stop() == 0
