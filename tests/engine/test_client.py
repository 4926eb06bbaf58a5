"""The asyncio client against a real engine child running the simulated worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from batching.core.event_log import replay
from batching.core.types import FinishReason, Request, SamplingParams
from batching.engine.client import EngineClient, EngineDeadError, EngineStartError
from batching.worker.simulated import simulated_token
from config.settings import EngineSettings
from tests.engine.requests import collect, events, request, until_idle


@pytest.fixture
async def engine(settings: EngineSettings) -> AsyncIterator[EngineClient]:
    client = EngineClient(settings)
    await client.start()
    yield client
    await client.close()


async def test_before_its_start_there_is_no_engine(settings: EngineSettings) -> None:
    client = EngineClient(settings)
    assert not client.alive
    with pytest.raises(EngineDeadError):
        client.submit(request("early", [1], 1))


async def test_concurrent_requests_get_their_own_tokens(engine: EngineClient) -> None:
    alone = [await collect(engine.submit(request(f"a{i}", [i] * 40, 20))) for i in range(8)]
    crowd = await asyncio.gather(
        *(collect(engine.submit(request(f"b{i}", [i] * 40, 20))) for i in range(8))
    )
    for (tokens_alone, _), (tokens, last) in zip(alone, crowd, strict=True):
        assert tokens == tokens_alone
        assert len(tokens) == 20
        assert last.finish is FinishReason.LENGTH
    assert len({tuple(tokens) for tokens, _ in crowd}) == 8
    await until_idle(engine)


async def test_a_resumed_request_continues_exactly(engine: EngineClient) -> None:
    whole, _ = await collect(engine.submit(request("whole", [5, 6], 12)))
    rest = Request(
        "rest", [5, 6], SamplingParams(max_tokens=12), time.monotonic(), generated=whole[:7]
    )
    tokens, last = await collect(engine.submit(rest))
    assert tokens == whole[7:]
    assert last.finish is FinishReason.LENGTH


async def test_cancel_ends_the_stream_and_frees_everything(settings: EngineSettings) -> None:
    endless = {"max_model_len": 1_000_000, "num_blocks": 65_536}
    engine = EngineClient(settings.model_copy(update=endless))
    await engine.start()
    stream = engine.submit(request("gone", [1, 2, 3], 999_000))
    first = await anext(events(stream))
    assert first.tokens
    stream.cancel()
    stream.cancel()
    remaining = [event async for event in events(stream)]
    assert remaining[-1].finish is FinishReason.ABORT
    await until_idle(engine)
    await engine.close()


async def test_an_unservable_request_fails_alone(engine: EngineClient) -> None:
    good = engine.submit(request("good", [1], 5))
    _, last = await collect(engine.submit(request("long", [1] * 300, 5)))
    assert last.finish is FinishReason.ERROR
    assert last.error
    tokens, _ = await collect(good)
    assert len(tokens) == 5


async def test_slow_reader_gets_one_merged_event(engine: EngineClient) -> None:
    stream = engine.submit(request("slow", [9], 30))
    await until_idle(engine)
    (event,) = [event async for event in events(stream)]
    assert len(event.tokens) == 30
    assert event.cached_tokens == 0


async def test_a_bad_model_folder_is_a_clear_start_error(tmp_path: Path) -> None:
    client = EngineClient(EngineSettings(model=str(tmp_path), worker="simulated"))
    with pytest.raises(EngineStartError, match=r"config\.json"):
        await client.start()


async def test_the_event_log_replays_to_the_same_plans(
    settings: EngineSettings, tmp_path: Path
) -> None:
    path = tmp_path / "events"
    client = EngineClient(settings.model_copy(update={"event_log": str(path)}))
    await client.start()
    await asyncio.gather(
        *(collect(client.submit(request(f"r{i}", [i] * 30, 10))) for i in range(5))
    )
    await client.close()
    plans = list(replay(path.read_bytes().splitlines(keepends=True)))
    assert sum(plan.token_count for plan in plans) >= 5 * (30 + 9)


def test_simulated_tokens_depend_on_position_and_prompt_only() -> None:
    tokens = [simulated_token(7, position, 50) for position in range(100)]
    assert tokens == [simulated_token(7, position, 50) for position in range(100)]
    assert len(set(tokens)) > 30
    assert all(0 <= token < 50 for token in tokens)
