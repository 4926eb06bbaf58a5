"""Make requests, read streams, wait for quiet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from batching.core.types import Request, SamplingParams, TokenEvent
from batching.engine.client import EngineClient, RequestStream


def request(name: str, prompt: list[int], max_tokens: int) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens), time.monotonic())


async def events(stream: RequestStream) -> AsyncGenerator[TokenEvent]:
    """A stream's events as they come; neighbours may have merged."""
    news = asyncio.Event()
    stream.on_news = news.set
    while True:
        if (event := stream.take()) is None:
            await news.wait()
            news.clear()
            continue
        yield event
        if event.finish is not None:
            return


async def collect(stream: RequestStream) -> tuple[list[int], TokenEvent]:
    """All tokens and the last event."""
    tokens: list[int] = []
    async for event in events(stream):
        tokens += event.tokens
    return tokens, event


async def until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Wait for a condition. Raises `AssertionError` if it does not come true."""
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(what)


async def until_idle(engine: EngineClient) -> None:
    """Wait until the engine reports that nothing runs, waits or holds a block."""

    def idle() -> bool:
        s = engine.stats
        return engine.alive and bool(s.steps) and not (s.running or s.waiting or s.blocks_used)

    await until(idle, f"the engine kept work or blocks: {engine.stats}")
