"""Who waits long for a stream's next word hears that the server still works on it."""

from __future__ import annotations

import asyncio
import json

import anthropic
import openai
import pytest
from starlette.types import Message

from app.http import sse
from tests.app.conftest import MODEL, Live, Server
from tests.app.test_disconnect import send, until


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.02)


def text_of(stream: bytes) -> str:
    events = [part.split(b"\n")[0] for part in stream.split(b"data: ")[1:]]
    chunks = [json.loads(event) for event in events if event.startswith(b"{")]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


@pytest.mark.parametrize("tokens", [0, 3])
async def test_comments_come_while_nothing_else_does(server: Server, tokens: int) -> None:
    server.engine.script = lambda request: [70] * 5
    server.engine.resume.clear()
    server.engine.free_tokens = tokens
    async with Live(server) as live:
        reader, writer = await send(live.port, stream=True)
        seen = b""
        while seen.count(sse.KEEP_ALIVE) < 3:
            seen += await reader.read(1000)
        before = text_of(seen)
        server.engine.resume.set()
        seen += await reader.readuntil(b"[DONE]")
        writer.close()
    assert seen.startswith(b"HTTP/1.1 200")
    assert before == tokens * server.service.tokenizer.token_text(70)
    assert text_of(seen) == 5 * server.service.tokenizer.token_text(70)


async def test_the_clients_pay_no_heed(server: Server) -> None:
    server.say("hello world, this is a test")
    server.engine.resume.clear()
    server.engine.free_tokens = 2
    async with Live(server) as live:
        url = f"http://127.0.0.1:{live.port}"
        ours = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        theirs = anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0)

        async def chat() -> str:
            chunks = await ours.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in chunks])

        async def response() -> str:
            async with ours.responses.stream(model=MODEL, input="hi") as stream:
                return (await stream.get_final_response()).output_text

        async def message() -> str:
            async with theirs.messages.stream(
                model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=50
            ) as stream:
                return await stream.get_final_text()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask()) for ask in (chat, response, message)]
            await until(lambda: server.service.metrics.generation_tokens == 6)
            await asyncio.sleep(0.1)  # comments are sent
            server.engine.resume.set()
        assert [task.result() for task in tasks] == ["hello world, this is a test"] * 3
        await ours.close()
        await theirs.close()


async def test_a_failure_after_that_is_the_last_event(server: Server) -> None:
    server.engine.resume.clear()
    async with Live(server) as live:
        reader, writer = await send(live.port, stream=True)
        await reader.readuntil(sse.KEEP_ALIVE)
        server.engine.error = "out of luck"
        server.engine.resume.set()
        tail = await reader.readuntil(b"[DONE]")
        writer.close()
    assert b'"code":"engine_error"' in tail


async def test_who_leaves_then_is_forgotten(server: Server) -> None:
    server.engine.resume.clear()
    async with Live(server) as live:
        reader, writer = await send(live.port, stream=True)
        await reader.readuntil(sse.KEEP_ALIVE)
        writer.transport.abort()
        await until(lambda: len(server.engine.aborted) == 1)
        await until(lambda: server.service.metrics.finished["abort"] == 1)


async def test_what_fails_to_end_is_closed_all_the_same() -> None:
    async def source(stream: sse.EventStream) -> bytes:
        stream.write(b"data: 1\n\n")
        await asyncio.sleep(0)
        raise RuntimeError("at the end")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {}

    closed: list[bool] = []
    stream = sse.EventStream(source, lambda: closed.append(True), sse.OPENAI_END)
    with pytest.raises(RuntimeError, match="at the end"):
        await stream({"type": "http"}, receive, send)
    assert closed == [True]
