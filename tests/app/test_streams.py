"""Streams side by side: what leaves together, and that the fault of one is nobody else's."""

from __future__ import annotations

import asyncio
import json

import pytest

from app.openai.completions import CompletionChunks
from app.outputs.choice import Delta
from batching.core.types import FinishReason, Request, SamplingParams, TokenEvent
from batching.engine.client import EngineDeadError, RequestStream
from tests.app.conftest import Live, Server
from tests.app.test_disconnect import send


async def chunks(reader: asyncio.StreamReader) -> list[bytes]:
    """The pieces of a chunked body, as they were written."""
    await reader.readuntil(b"\r\n\r\n")
    found = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        found.append(await reader.readexactly(size))
        await reader.readexactly(2)
    return found


async def test_what_choices_gain_together_is_one_write(server: Server) -> None:
    server.engine.script = lambda request: [70] * 5
    async with Live(server) as live:
        reader, writer = await send(live.port, stream=True, n=3, max_tokens=5)
        counts = [chunk.count(b"data: ") for chunk in await chunks(reader)]
        writer.close()
    assert sum(counts) == 3 * 5 + 1
    assert counts[1:4] == [3, 3, 3]  # of the first, those count that had come when it was written


async def test_a_stream_that_cannot_be_written_ends_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = CompletionChunks.piece

    def faulty(self: CompletionChunks, index: int, delta: Delta) -> bytes:
        if self._jobs[0].prompt == [71] and self._jobs[0].choice.tokens == 3:
            raise RuntimeError("a bug")
        return write(self, index, delta)

    monkeypatch.setattr(CompletionChunks, "piece", faulty)
    server.engine.script = lambda request: [70] * 5
    async with Live(server) as live:
        bad, bad_writer = await send(live.port, prompt=[71], stream=True, max_tokens=5)
        good, good_writer = await send(live.port, stream=True, max_tokens=5)
        whole, cut = b"".join(await chunks(good)), await bad.read()
        good_writer.close()
        bad_writer.close()
    events = [json.loads(part.split(b"\n")[0]) for part in whole.split(b"data: ")[1:-1]]
    assert len(events) == 5
    assert cut.count(b"data: ") == 2
    assert b"[DONE]" not in cut
    assert server.engine.running == 0
    assert server.service.metrics.finished == {"length": 1, "abort": 1}


def test_news_merge_until_they_are_taken() -> None:
    aborted: list[str] = []
    stream = RequestStream(Request("r", [1], SamplingParams(max_tokens=9), 0.0), aborted.append)
    told: list[bool] = []
    stream.on_news = lambda: told.append(True)
    stream.add(TokenEvent("r", tokens=(1,), cached_tokens=0))
    assert not told
    stream.push(TokenEvent("r", tokens=(2, 3)))
    assert told
    assert stream.take() == TokenEvent("r", tokens=(1, 2, 3), cached_tokens=0)
    assert stream.take() is None
    stream.push(TokenEvent("r", tokens=(4,)))
    stream.fail(EngineDeadError("gone"))
    event = stream.take()
    assert event is not None
    assert event.tokens == (4,)
    with pytest.raises(EngineDeadError):
        stream.take()
    stream.cancel()
    assert not aborted


def test_cancelling_is_the_last_news() -> None:
    aborted: list[str] = []
    stream = RequestStream(Request("r", [1], SamplingParams(max_tokens=9), 0.0), aborted.append)
    stream.cancel()
    stream.cancel()
    event = stream.take()
    assert event is not None
    assert event.finish is FinishReason.ABORT
    assert aborted == ["r"]
