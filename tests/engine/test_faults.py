"""Engines that are killed, stopped, or crashed by a request: no stream loses or repeats a token."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batching.core.event_log import replay
from batching.core.types import FinishReason, Request, TokenEvent
from batching.engine import process, restart_policy
from batching.engine.client import EngineClient, EngineDeadError, EngineStartError, RequestStream
from batching.engine.messages import StepOutput
from config.settings import EngineSettings
from tests.engine.faulty_child import Fault
from tests.engine.requests import collect, events, request, until, until_idle

TOKENS = 80

Start = Callable[..., Awaitable[EngineClient]]


@pytest.fixture
async def start(settings: EngineSettings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """Starts engines with the faulty worker: `start(on_step=None, **settings)`."""
    monkeypatch.chdir(Path(__file__).parents[2])  # where the child's module is found
    monkeypatch.setattr(process, "SILENCE_SECONDS", 0.5)
    monkeypatch.setitem(process._DEVICE_SILENCE_SECONDS, "none", 2.0)
    monkeypatch.setattr(restart_policy, "_LONGEST_DELAY", 0.05)
    engines: list[EngineClient] = []

    async def launch(
        on_step: Callable[[StepOutput], None] | None = None, **update: object
    ) -> EngineClient:
        changed = settings.model_copy(update={"num_blocks": 512, "step_timeout_s": 1.5, **update})
        engine = EngineClient(changed, on_step, child_module="tests.engine.faulty_child")
        engines.append(engine)
        await engine.start()
        return engine

    yield launch
    for engine in engines:
        await engine.close()


def scored_request(i: int) -> Request:
    """A request that also wants logprobs, of its prompt too."""
    plain = request(f"r{i}", [i] * (20 + i), TOKENS)
    params = msgspec.structs.replace(plain.params, seed=i, logprobs=0, prompt_logprobs=0)
    return msgspec.structs.replace(plain, params=params)


async def collect_all(stream: RequestStream) -> TokenEvent:
    """Every event of a stream as one."""
    whole, cached = TokenEvent(stream.request.id), []
    async for event in events(stream):
        whole = msgspec.structs.replace(
            event,
            tokens=whole.tokens + event.tokens,
            logprobs=whole.logprobs + event.logprobs,
            prompt_logprobs=whole.prompt_logprobs + event.prompt_logprobs,
        )
        cached += [event.cached_tokens] if event.cached_tokens is not None else []
    assert len(cached) == 1
    return msgspec.structs.replace(whole, cached_tokens=cached[0])


async def kill_when_moving(engine: EngineClient, number: int) -> None:
    """Send the child a signal when it has generated some tokens for everybody."""
    before = engine.stats.generation_tokens
    await until(
        lambda: engine.alive and engine.stats.generation_tokens > before + 16 * 12, "no progress"
    )
    assert engine.pid is not None
    os.kill(engine.pid, number)
    await until(lambda: not engine.alive, "nobody noticed")


@pytest.mark.parametrize("signals", [[signal.SIGKILL] * 3, [signal.SIGSTOP]])
async def test_streams_continue_exactly(start: Start, signals: list[int]) -> None:
    seen: list[int] = []
    engine = await start(lambda output: seen.append(output.stats.generation_tokens))
    whole = await asyncio.gather(
        *(collect_all(engine.submit(scored_request(i))) for i in range(16))
    )
    streams = [engine.submit(scored_request(i)) for i in range(16)]
    readers = [asyncio.create_task(collect_all(stream)) for stream in streams]
    for number in signals:
        await kill_when_moving(engine, number)
    disturbed = await asyncio.gather(*readers)
    for event, other in zip(whole, disturbed, strict=True):
        assert (event.tokens, event.logprobs) == (other.tokens, other.logprobs)
        assert event.prompt_logprobs == other.prompt_logprobs
        assert event.cached_tokens == other.cached_tokens == 0
        assert other.finish is FinishReason.LENGTH
        assert len(event.tokens) == len(event.logprobs) == TOKENS
        assert len(event.prompt_logprobs) == 19 + int(event.id[1:])
    assert len({event.tokens for event in whole}) == 16
    assert engine.restarts == len(signals)
    assert engine.resumed_streams == 16 * len(signals)
    assert seen == sorted(seen)
    await until_idle(engine)


async def test_what_happens_while_the_engine_is_down_is_honoured(start: Start) -> None:
    engine = await start()
    aborted = engine.submit(request("aborted", [1], 200))
    kept = engine.submit(request("kept", [2], 50))
    await anext(events(aborted))
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: not engine.alive, "nobody noticed")
    assert engine.failure is not None and "SIGKILL" in engine.failure
    assert engine.stats.running == engine.stats.blocks_used == 0
    aborted.cancel()
    late = engine.submit(request("late", [3], 50))
    unwanted = engine.submit(request("unwanted", [4], 50))
    unwanted.cancel()
    for stream in (kept, late):
        tokens, last = await collect(stream)
        assert len(tokens) == 50 and last.finish is FinishReason.LENGTH
    assert (await collect(unwanted))[1].finish is FinishReason.ABORT
    assert engine.resumed_streams == 1
    await until_idle(engine)


@pytest.mark.parametrize(
    "fault,crashes", [(Fault.OUT_OF_MEMORY, 3), (Fault.RAISE_LATE, 3), (Fault.KILL, 5)]
)
async def test_a_poisonous_request_fails_alone(start: Start, fault: Fault, crashes: int) -> None:
    engine = await start()
    jobs = [request(f"r{i}", [i] * 20, TOKENS) for i in range(10)]
    whole = await asyncio.gather(*(collect(engine.submit(job)) for job in jobs))
    crowd = [asyncio.create_task(collect(engine.submit(job))) for job in jobs[:5]]
    poison = asyncio.create_task(collect(engine.submit(request("poison", [fault, 1], TOKENS))))
    crowd += [asyncio.create_task(collect(engine.submit(job))) for job in jobs[5:]]
    tokens, last = await poison
    assert last.finish is FinishReason.ERROR
    assert last.error is not None and "crashed the engine repeatedly" in last.error
    assert len(tokens) <= 3 * crashes
    for (expected, _), (got, end) in zip(whole, await asyncio.gather(*crowd), strict=True):
        assert got == expected
        assert end.finish is FinishReason.LENGTH
    assert engine.restarts == crashes
    await until_idle(engine)


async def test_a_stopped_engine_gets_no_time_for_a_long_step(start: Start) -> None:
    engine = await start(step_timeout_s=3600.0)
    stream = engine.submit(request("r", [Fault.HANG], 5))
    await asyncio.sleep(0.2)  # it is in its first step
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)
    await until(lambda: not engine.alive, "nobody noticed")
    stream.cancel()


@pytest.mark.parametrize("fault", [Fault.RAISE, Fault.HANG])
async def test_a_request_alone_has_two_attempts(start: Start, fault: Fault) -> None:
    engine = await start()
    _, last = await collect(engine.submit(request("poison", [fault], 5)))
    assert last.finish is FinishReason.ERROR
    tokens, _ = await collect(engine.submit(request("next", [1], 5)))
    assert len(tokens) == 5
    assert engine.restarts == 2


async def test_several_poisonous_requests_are_all_found(start: Start) -> None:
    engine = await start()
    prompts = [[Fault.RAISE, 1], [1] * 20, [Fault.RAISE_LATE, 2], [2] * 20, [Fault.SEGFAULT, 3]]
    streams = [engine.submit(request(f"r{i}", prompt, 30)) for i, prompt in enumerate(prompts)]
    ends = [last.finish for _, last in await asyncio.gather(*map(collect, streams))]
    error, length = FinishReason.ERROR, FinishReason.LENGTH
    assert ends == [error, length, error, length, error]
    await until_idle(engine)


async def test_a_death_that_is_explained_does_not_count(start: Start) -> None:
    engine = await start(restart_limit=1)
    _, last = await collect(engine.submit(request("poison", [Fault.RAISE], 5)))
    assert last.finish is FinishReason.ERROR
    tokens, _ = await collect(engine.submit(request("next", [1], 5)))
    assert len(tokens) == 5
    assert engine.restarts == 2


async def test_poisonous_requests_in_a_row_do_not_use_up_the_restarts(start: Start) -> None:
    engine = await start(restart_limit=2, max_model_len=512)
    jobs = [request(f"r{i}", [i] * 20, 250) for i in range(4)]
    whole = await asyncio.gather(*(collect(engine.submit(job)) for job in jobs))
    crowd = [asyncio.create_task(collect(engine.submit(job))) for job in jobs]
    for n in range(3):
        _, last = await collect(engine.submit(request(f"poison{n}", [Fault.RAISE_LATE, 1], 50)))
        assert last.finish is FinishReason.ERROR
    assert not any(reader.done() for reader in crowd), "nobody was beside them"
    for (expected, _), (got, end) in zip(whole, await asyncio.gather(*crowd), strict=True):
        assert got == expected
        assert end.finish is FinishReason.LENGTH
    assert engine.restarts > 6
    await until_idle(engine)


async def test_an_engine_that_keeps_dying_is_given_up(start: Start) -> None:
    engine = await start(restart_limit=1)
    stream = engine.submit(request("open", [1], 200))
    await anext(events(stream))
    for _ in range(2):
        await until(lambda: engine.alive, "no engine")
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        await until(lambda: not engine.alive, "nobody noticed")
    with pytest.raises(EngineDeadError, match="died too often"):
        await collect(stream)
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        engine.submit(request("late", [1], 1))


async def test_a_restart_that_fails_is_tried_again(start: Start, settings: EngineSettings) -> None:
    engine = await start()
    config = Path(settings.model) / "config.json"
    content = config.read_text()
    config.unlink()
    stream = engine.submit(request("open", [1], 60))
    await anext(events(stream))
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: "config.json" in (engine.failure or ""), "no failed restart")
    config.write_text(content)
    tokens, _ = await collect(stream)
    assert 0 < len(tokens) < 60
    assert engine.alive
    assert engine.restarts >= 2


async def test_a_launch_that_lacks_descriptors_is_tried_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start()
    pairs: list[tuple[socket.socket, socket.socket]] = []
    launch, pair = asyncio.create_subprocess_exec, socket.socketpair

    def noted_pair() -> tuple[socket.socket, socket.socket]:
        pairs.append(pair())
        return pairs[-1]

    async def fails_once(*args: Any, **options: Any) -> asyncio.subprocess.Process:
        if len(pairs) == 1:
            raise OSError(errno.EMFILE, "too many open files")
        return await launch(*args, **options)

    monkeypatch.setattr(socket, "socketpair", noted_pair)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", fails_once)
    stream = engine.submit(request("open", [1], 60))
    await anext(events(stream))
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    _, last = await collect(stream)
    assert last.finish is FinishReason.LENGTH
    assert engine.restarts == 2
    assert [end.fileno() for end in pairs[0]] == [-1, -1]


async def test_no_descriptors_for_a_first_start_are_a_failed_start(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(socket, "socketpair", fails)
    with pytest.raises(EngineStartError, match="too many open files"):
        await EngineClient(settings).start()


async def test_a_later_engine_has_as_many_blocks_whatever_is_free(
    start: Start, settings: EngineSettings
) -> None:
    config = Path(settings.model) / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "free_blocks": 12}))
    engine = await start(num_blocks=None)
    stream = engine.submit(request("open", [1], 150))
    await anext(events(stream))
    config.write_text(json.dumps({**content, "free_blocks": 4}))
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    _, last = await collect(stream)
    assert last.finish is FinishReason.LENGTH
    assert engine.restarts == 1
    assert engine.capabilities is not None and engine.capabilities.num_blocks == 12


async def test_a_child_that_does_not_start_in_time_is_killed(settings: EngineSettings) -> None:
    child = process.EngineProcess(settings, "batching.engine.child", lambda message: None)
    with pytest.raises(EngineStartError, match="did not start"):
        await child.start(timeout=0.01)
    assert child.pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


async def test_each_engine_leaves_its_event_log(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "events"
    engine = await start(event_log=str(path))
    _, last = await collect(engine.submit(request("poison", [Fault.RAISE], 5)))
    assert last.finish is FinishReason.ERROR
    await collect(engine.submit(request("next", [1], 5)))
    await engine.close()
    plans = [
        list(replay(name.read_bytes().splitlines(keepends=True)))
        for name in (tmp_path / "events.2", tmp_path / "events.1", path)
    ]
    assert [len(p) for p in plans] == [1, 1, 5]
