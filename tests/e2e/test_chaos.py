"""64 streams of every kind while the engine is killed, stopped, crashed and starved, and bad
clients do their worst: not one token is lost or repeated, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.replay import main as replay
from loadtest.chaos import Chaos
from tests.e2e.mixed_load import answer, case
from tests.e2e.server_process import FaultyServer, ServerProcess, running, wait_until
from tests.engine.faulty_child import Fault

STREAMS = 64
TOKENS = 300
MODEL = "chaos"
LIMITS = httpx.Limits(max_connections=None)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    process = FaultyServer(
        tmp_path / "log",
        *("--worker", "simulated", "--served-model-name", MODEL, "--restart-limit", "1000"),
        *("--max-queued-requests", "100", "--event-log", str(tmp_path / "events")),
    )
    with running(process, ServerProcess.kill):
        yield process


class Load:
    """All cases at once, and how much of their answers has come."""

    def __init__(self, server: FaultyServer) -> None:
        self._server = server
        self.client = httpx.AsyncClient(base_url=server.url, timeout=120, limits=LIMITS)
        self.cases = [case(index, TOKENS) for index in range(STREAMS)]

    async def plain(self) -> list[Any]:
        """Every answer, undisturbed."""
        return await asyncio.gather(*(answer(self.client, c, stream=False) for c in self.cases))

    async def disturbed(self, faults: list[int | Fault]) -> list[Any]:
        """Every answer, most of them streamed, while the engine has one fault after another."""
        tasks = [
            asyncio.create_task(answer(self.client, c, stream=index % 8 > 0))
            for index, c in enumerate(self.cases)
        ]
        for fault in faults:
            await self._progress()
            still_open = sum(not task.done() for task in tasks)
            assert still_open > STREAMS / 2, "the fault comes too late to matter"
            if isinstance(fault, Fault):
                await self._poison(fault)
            else:
                self._server.signal_engine(fault)
                await asyncio.to_thread(self._server.wait_health, 503, 10)
            await asyncio.to_thread(self._server.wait_health, 200, 60)
        return await asyncio.gather(*tasks)

    async def _progress(self) -> None:
        """Until the engine has generated a few more tokens for everybody."""
        before = await self._generated()
        while await self._generated() < before + 8 * STREAMS:
            await asyncio.sleep(0.02)

    async def _generated(self) -> float:
        return await asyncio.to_thread(self._server.metric, "vllm:generation_tokens_total")

    async def _poison(self, fault: Fault) -> None:
        """A request that brings the engine down whenever it is computed: it alone fails."""
        body = {"prompt": [fault, 1], "max_tokens": 50}
        id = f"poison-{fault.name}"
        response = await self.client.post(
            "/v1/completions", json=body, headers={"x-request-id": id}
        )
        assert response.status_code == 500, response.text
        error = response.json()["error"]
        assert id in error["message"] and "crashed the engine" in error["message"]
        assert (error["code"], response.headers["x-should-retry"]) == ("engine_error", "false")


async def misbehave(chaos: Chaos) -> None:
    """Bad clients of every kind, some again and again until cancelled."""

    async def repeat(kind: str) -> None:
        while True:
            await chaos.once(kind)

    for kind in ("oversized", "over the limit"):
        await chaos.once(kind)
    await asyncio.gather(*map(repeat, ("disconnect", "slow reader", "malformed")))


# The main one, those of grammars and large bodies, asyncio's pool: they come as they are needed.
KNOWN_THREADS = 3 + min(32, (os.cpu_count() or 1) + 4)


def resources(server: FaultyServer) -> dict[str, int]:
    """What the front end holds."""
    folder = Path(f"/proc/{server.process.pid}")
    return {
        "files": len(os.listdir(folder / "fd")),
        "threads": max(len(os.listdir(folder / "task")), KNOWN_THREADS),
        "tasks": int(server.metric("slipstream_event_loop_tasks")),
    }


async def back_to(server: FaultyServer, before: dict[str, int]) -> None:
    """Raises `AssertionError` unless the front end soon holds no more than before."""
    for _ in range(250):
        now = resources(server)
        if all(now[name] <= before[name] for name in before):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{before} became {now}")


@pytest.mark.timeout(300)
async def test_not_one_token_is_lost_or_repeated(
    server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = Load(server)
    async with load.client:
        expected = await load.plain()
    before = resources(server)
    load = Load(server)
    chaos = Chaos(server.url, MODEL, None, seed=1)
    bad = asyncio.create_task(misbehave(chaos))
    async with load.client:
        found = await load.disturbed([signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, Fault.RAISE])
    async with asyncio.timeout(60):
        while set(chaos.counts) != set(chaos.kinds):  # a slow reader takes its time
            await asyncio.sleep(0.1)
    bad.cancel()
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert one == other, load.cases[index]
    assert chaos.faults == {}
    server.wait_idle()
    await back_to(server, before)
    assert server.stop() == 0
    assert replay([str(tmp_path / "events")]) == 0
    pieces = capsys.readouterr().out.splitlines()
    assert len(pieces) >= 7 and all(piece.endswith("the same") for piece in pieces)
    assert "Exception in ASGI application" not in server.log()


async def test_a_flood_is_refused_and_forgotten(server: FaultyServer) -> None:
    """Beyond the queue: 429 with a time to wait, for those only, also while the engine restarts."""
    before = resources(server)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=LIMITS) as client:
        body = {"prompt": [1, 2], "max_tokens": 20, "ignore_eos": True, "seed": 1}
        expected = (await client.post("/v1/completions", json=body)).json()["choices"]
        server.signal_engine(signal.SIGSTOP)  # however slow the client, the queue fills
        flood = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(300)]
        await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        server.signal_engine(signal.SIGKILL)
        answers = await asyncio.gather(*flood)
    served = [a for a in answers if a.status_code == 200]
    refused = [a for a in answers if a.status_code == 429]
    assert len(served) + len(refused) == 300 and len(served) >= 100 and refused
    assert all(a.json()["choices"] == expected for a in served)
    assert all(int(a.headers["retry-after"]) >= 1 for a in refused)
    server.wait_idle()
    await back_to(server, before)


async def test_an_engine_killed_while_it_starts_is_started_again(server: FaultyServer) -> None:
    whole = case(1, TOKENS)
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        expected = await answer(client, whole, stream=False)
        stream = asyncio.create_task(answer(client, whole, stream=True))
        seen: set[int] = set()
        for _ in range(4):
            pid = await asyncio.to_thread(_another_engine, server, seen)
            seen.add(pid)
            await asyncio.sleep(0.05)
            os.kill(pid, signal.SIGKILL)
        assert await stream == expected
    assert server.metric("slipstream_engine_restarts_total") == 4
    server.wait_idle()


def _another_engine(server: FaultyServer, seen: set[int]) -> int:
    found: list[int] = []

    def appeared() -> bool:
        try:
            pid = server.engine_pid()
        except (AssertionError, OSError):
            return False
        found[:] = [pid]
        return pid not in seen

    wait_until(appeared, "no engine")
    return found[0]
