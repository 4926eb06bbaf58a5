"""Pooling engines that are killed, stopped or crashed by a text: every other text is computed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from batching.core.types import PoolRequest, PoolResult
from batching.engine import process, restart_policy
from batching.engine.pool_client import OnBatch, PoolClient, PoolError
from batching.engine.stream import EngineDeadError
from config.settings import EngineSettings
from tests.engine.faulty_child import Fault
from tests.engine.requests import until

Start = Callable[..., Awaitable[PoolClient]]


@pytest.fixture
async def start(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """Starts engines with the faulty worker: `start(on_batch=None, **settings)`."""
    monkeypatch.chdir(Path(__file__).parents[2])  # where the child's module is found
    monkeypatch.setattr(process, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(restart_policy, "_LONGEST_DELAY", 0.05)
    engines: list[PoolClient] = []

    async def launch(on_batch: OnBatch | None = None, **update: object) -> PoolClient:
        changed = settings.model_copy(update={"max_sequences": 4, "step_timeout_s": 1.5, **update})
        engine = PoolClient(changed, on_batch, child_module="tests.engine.faulty_pool_child")
        engines.append(engine)
        await engine.start()
        return engine

    yield launch
    for engine in engines:
        await engine.close()


def call(name: str, texts: Sequence[Sequence[int]]) -> list[PoolRequest]:
    now = time.monotonic()
    return [PoolRequest(f"{name}-{i}", name, list(t), now) for i, t in enumerate(texts)]


def assert_idle(engine: PoolClient) -> None:
    assert engine.counts() == (0, 0)


async def numbers(engine: PoolClient, name: str, texts: Sequence[Sequence[int]]) -> None:
    """Check that a call gets each of its texts' numbers, in order."""
    results = await engine.submit(call(name, texts)).results()
    assert [r.id for r in results] == [f"{name}-{i}" for i in range(len(texts))]
    assert [list(array("f", r.values)) for r in results] == [list(t) for t in texts]
    assert all(0 < r.scheduled <= r.finished for r in results)


async def test_calls_share_batches_and_get_what_is_theirs(start: Start) -> None:
    seen: list[PoolRequest] = []
    sizes: list[int] = []

    def on_batch(batch: Sequence[tuple[PoolRequest, PoolResult]], tokens: int) -> None:
        seen.extend(request for request, _ in batch)
        sizes.append(tokens)

    engine = await start(on_batch)
    calls = [numbers(engine, f"c{i}", [[i, j] for j in range(1 + i % 5)]) for i in range(20)]
    await asyncio.gather(*calls)
    texts = sum(1 + i % 5 for i in range(20))
    assert engine.stats.prompt_tokens == 2 * texts
    assert engine.stats.steps < texts  # several to a batch
    assert len(seen) == len({request.id for request in seen}) == texts
    assert sum(sizes) == 2 * texts and max(sizes) > 2
    assert_idle(engine)


async def test_a_long_call_does_not_hold_up_a_short_one(start: Start) -> None:
    engine = await start()
    long = engine.submit(call("long", [[1]] * 400))
    await until(lambda: engine.stats.steps >= 1, "no batch")
    await numbers(engine, "short", [[2, 3]])
    assert engine.stats.steps <= 50  # of the hundred that the long call takes
    long.cancel()


async def test_cancelling_drops_what_waits(start: Start) -> None:
    engine = await start()
    long = engine.submit(call("long", [[1]] * 4000))
    await until(lambda: engine.stats.steps >= 1, "no batch")
    long.cancel()
    long.cancel()
    assert_idle(engine)
    with pytest.raises(asyncio.CancelledError):
        await long.results()
    await numbers(engine, "next", [[5]])
    assert engine.stats.steps < 100


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_texts_survive_a_kill_and_a_hang(start: Start, number: int) -> None:
    engine = await start()
    readers = [
        asyncio.create_task(numbers(engine, f"c{i}", [[i, j] for j in range(60)])) for i in range(4)
    ]
    await until(lambda: engine.stats.steps >= 5, "no progress")
    assert engine.pid is not None
    os.kill(engine.pid, number)
    await until(lambda: not engine.alive, "nobody noticed")
    late = asyncio.create_task(numbers(engine, "late", [[9]]))
    await asyncio.gather(*readers, late)
    assert engine.restarts == 1
    assert engine.resumed_streams > 0
    assert engine.stats.prompt_tokens >= 4 * 60 * 2  # totals go on
    assert_idle(engine)


@pytest.mark.parametrize("fault", [Fault.RAISE, Fault.SEGFAULT, Fault.KILL])
async def test_a_poisonous_text_fails_its_call_alone(start: Start, fault: Fault) -> None:
    engine = await start()
    others = [asyncio.create_task(numbers(engine, f"c{i}", [[i, j] for j in range(9)]))
              for i in range(3)]  # fmt: skip
    poisoned = engine.submit(call("poison", [[1, 2], [fault, 2], [3, 4]]))
    with pytest.raises(PoolError, match="crashed the engine repeatedly"):
        await poisoned.results()
    await asyncio.gather(*others)
    await numbers(engine, "next", [[5]])
    assert_idle(engine)


async def test_an_engine_that_keeps_dying_is_given_up(start: Start) -> None:
    engine = await start(restart_limit=0)
    open_call = engine.submit(call("open", [[1]] * 400))
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="died too often"):
        await open_call.results()
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        engine.submit(call("late", [[1]]))
    assert_idle(engine)
