"""`/v1/chat/completions`: messages, templates, choices, logprobs, streams."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.app.conftest import Server

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


def prompt_text(server: Server) -> str:
    ids = server.engine.requests[-1].prompt
    return str(server.service.tokenizer.backend.decode(ids, skip_special_tokens=False))


async def test_shape(server: Server) -> None:
    server.say("hello world")
    answer = await server.ok(PATH, messages=[USER])
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hello world", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 3
    assert prompt_text(server) == "<|user|>hi<|end|><|assistant|>"
    room = 256 - len(server.engine.requests[-1].prompt)
    assert server.engine.requests[-1].params.max_tokens == room


async def test_every_kind_of_message_reaches_the_prompt(server: Server) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await server.ok(
        PATH,
        max_tokens=2,
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts, "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
            {"role": "assistant"},
        ],
    )
    call["function"]["arguments"] = {"x": 1}  # type: ignore[index]
    assert prompt_text(server) == (
        "<|system|>be brief<|end|><|user|>one\ntwo<|end|>"
        f"<|assistant|>{json.dumps([call])}<|end|><|tool|>42<|end|><|assistant|><|end|>"
        "<|assistant|>"
    )


async def test_template_options(server: Server) -> None:
    await server.ok(PATH, messages=[USER], add_generation_prompt=False, max_tokens=2)
    assert prompt_text(server) == "<|user|>hi<|end|>"
    kwargs = {"suffix": " well"}
    await server.ok(PATH, messages=[USER], chat_template_kwargs=kwargs, max_tokens=2)
    assert prompt_text(server) == "<|user|>hi<|end|><|assistant|> well"
    last = {"role": "assistant", "content": "hello wor"}
    fields = {"add_generation_prompt": False, "continue_final_message": True, "max_tokens": 2}
    await server.ok(PATH, messages=[USER, last], **fields)
    assert prompt_text(server) == "<|user|>hi<|end|><|assistant|>hello wor"


async def test_tools_reach_the_prompt_with_tool_choice_none(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    await server.ok(PATH, messages=[USER], tools=[tool], tool_choice="none", max_tokens=2)
    assert json.dumps([tool]) in prompt_text(server)
    await server.ok(PATH, messages=[USER], tools=[], max_tokens=2)


async def test_stream_equals_plain(server: Server) -> None:
    fields: dict[str, Any] = {
        "messages": [USER], "n": 3, "seed": 3, "max_tokens": 40, "logprobs": True,
        "top_logprobs": 2,
    }  # fmt: skip
    plain = await server.ok(PATH, **fields)
    chunks = await server.events(PATH, **fields)
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({(c["id"], c["created"]) for c in chunks}) == 1
    for expected in plain["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert mine[0]["delta"]["role"] == "assistant"
        assert all("role" not in c["delta"] for c in mine[1:])
        text = "".join(c["delta"].get("content", "") for c in mine)
        assert text == expected["message"]["content"]
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == expected["finish_reason"]
        entries = [e for c in mine if c["logprobs"] for e in c["logprobs"]["content"]]
        assert entries == expected["logprobs"]["content"]


async def test_logprob_bytes_join_to_the_text(server: Server) -> None:
    server.say("naïve 日本語 😀 hello")
    for stop in (None, ["llo"], [" 😀"]):
        fields = {"messages": [USER], "logprobs": True, "stop": stop}
        (choice,) = (await server.ok(PATH, **fields))["choices"]
        entries = choice["logprobs"]["content"]
        joined = b"".join(bytes(e["bytes"]) for e in entries).decode()
        assert joined.startswith(choice["message"]["content"])
        if stop is None:
            assert joined == choice["message"]["content"]
        assert all(e["top_logprobs"] == [] for e in entries)


@pytest.mark.parametrize("skip", [True, False])
async def test_hidden_tokens_have_a_name_but_no_bytes(server: Server, skip: bool) -> None:
    tokens = [*server.ids("hello"), 0, *server.ids(" world"), 0]
    server.engine.script = lambda request: tokens
    fields = {"ignore_eos": True, "skip_special_tokens": skip, "logprobs": True}
    (choice,) = (await server.ok(PATH, messages=[USER], **fields))["choices"]
    entries = choice["logprobs"]["content"]
    assert [e["token"] for e in entries] == ["hello", "<|end|>", " world", "<|end|>"]
    text = b"".join(bytes(e["bytes"]) for e in entries).decode()
    assert text == choice["message"]["content"]
    assert text == ("hello world" if skip else "hello<|end|> world<|end|>")
    chunks = await server.events(PATH, messages=[USER], **fields)
    mine = [c["choices"][0]["logprobs"] for c in chunks]
    assert [e for logprobs in mine if logprobs for e in logprobs["content"]] == entries


async def test_sampled_token_is_among_the_top(server: Server) -> None:
    server.say("hello world")
    fields = {"messages": [USER], "logprobs": True, "top_logprobs": 2}
    (choice,) = (await server.ok(PATH, **fields))["choices"]
    for entry in choice["logprobs"]["content"]:
        assert entry["token"] in [t["token"] for t in entry["top_logprobs"]]
        assert min(t["logprob"] for t in entry["top_logprobs"]) == -9999.0


async def test_stream_with_stop_and_usage(server: Server) -> None:
    server.say("hello world, this")
    chunks = await server.events(
        PATH, messages=[USER], stop=["wor"], stream_options={"include_usage": True}
    )
    text = "".join(c["choices"][0]["delta"]["content"] for c in chunks[:-1])
    assert text == "hello "
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2


async def test_the_role_and_the_first_token_are_one_write(server: Server) -> None:
    """Nobody who counts the first chunk as the first token is misled."""
    server.say("hello world")
    server.engine.resume.clear()
    messages: list[dict[str, Any]] = []
    sent = [{"type": "http.request", "body": json.dumps(
        {"messages": [USER], "stream": True}).encode(), "more_body": False}]  # fmt: skip

    async def receive() -> dict[str, Any]:
        if sent:
            return sent.pop()
        import asyncio

        return await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: Any) -> None:
        messages.append(message)

    server.engine.resume.set()
    scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "query_string": b""}
    await server.app(scope, receive, send)  # type: ignore[arg-type]
    first = messages[1]["body"]
    assert first.count(b"data: ") == 2
    assert b'"role":"assistant"' in first
    assert b'"content":"hello"' in first


async def test_model_without_a_template(server: Server) -> None:
    from dataclasses import replace

    from app.application import create_app

    bare = replace(server.service, template=None)
    server.http._transport.app = create_app(bare)  # type: ignore[attr-defined]
    response = await server.post(PATH, messages=[USER])
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "no_chat_template"
