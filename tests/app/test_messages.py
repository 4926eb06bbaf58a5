"""`/v1/messages`: Anthropic's requests, answers, events and errors; its own client reads them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx2
import pytest

from tests.app.conftest import MakeServer, Server

PATH = "/v1/messages"
USER = {"role": "user", "content": "hi"}
ASK = {"max_tokens": 20, "messages": [USER]}


async def events(server: Server, **fields: Any) -> list[dict[str, Any]]:
    return await server.named_events(PATH, **fields)


def check_error(response: Any, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert body["error"]["type"] == kind
    assert body["request_id"] == response.headers["request-id"]
    assert response.headers["x-request-id"] == response.headers["request-id"]
    return str(body["error"]["message"])


async def test_shape(server: Server) -> None:
    server.say("hello world")
    answer = await server.ok(PATH, **ASK, system="be brief", model="tiny")
    assert server.prompt_text == "<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    assert answer.pop("id").startswith("msg_")
    prompt = len(server.engine.requests[-1].prompt)
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": "hello world"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": prompt, "output_tokens": 3,
            "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
        },
    }  # fmt: skip


async def test_every_block_reaches_the_prompt(server: Server) -> None:
    await server.ok(
        PATH,
        max_tokens=2,
        system=[{"type": "text", "text": "be", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "brief"}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "one"},
                                         {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "well"},
                {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c1",
                 "content": [{"type": "text", "text": "42"}]},
                {"type": "tool_result", "tool_use_id": "c2", "content": "no", "is_error": True},
                {"type": "tool_result", "tool_use_id": "c3"},
                {"type": "text", "text": "and?"}]},
            {"role": "system", "content": "now"},
        ],
    )  # fmt: skip
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert server.prompt_text == (
        "<|system|>be\nbrief<|end|><|user|>one\ntwo<|end|>"
        f"<|assistant|>well{json.dumps([call])}<|end|><|tool|>42<|end|><|tool|>Error: no<|end|>"
        "<|tool|><|end|><|user|>and?<|end|><|system|>now<|end|><|assistant|>"
    )


async def test_the_last_message_of_the_assistant_is_continued(server: Server) -> None:
    messages = [USER, {"role": "assistant", "content": "hello wor"}]
    await server.ok(PATH, max_tokens=2, messages=messages)
    assert server.prompt_text == "<|user|>hi<|end|><|assistant|>hello wor"


async def test_why_it_stopped(server: Server) -> None:
    server.say("hello world, this")
    for fields, reason, sequence, text in (
        ({}, "end_turn", None, "hello world, this"),
        ({"max_tokens": 2}, "max_tokens", None, "hello world"),
        ({"stop_sequences": ["zzz", "wor"]}, "stop_sequence", "wor", "hello "),
    ):
        answer = await server.ok(PATH, **ASK | fields)
        assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
        assert answer["content"][0]["text"] == text
        change = (await events(server, **ASK | fields))[-2]
        assert change["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
        assert change["usage"] == answer["usage"]


async def test_events_tell_the_whole_story_in_order(server: Server) -> None:
    server.say("hello world, this")
    plain = await server.ok(PATH, **ASK)
    found = await events(server, **ASK)
    kinds = [event["type"] for event in found]
    deltas = kinds.count("content_block_delta")
    assert kinds == [
        "message_start", "ping", "content_block_start", *["content_block_delta"] * deltas,
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert deltas > 1
    start = found[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None
    assert start["usage"]["input_tokens"] == plain["usage"]["input_tokens"]
    assert found[2]["content_block"] == {"type": "text", "text": ""}
    assert {event["index"] for event in found if "index" in event} == {0}
    pieces = [event["delta"] for event in found if event["type"] == "content_block_delta"]
    assert {piece["type"] for piece in pieces} == {"text_delta"}
    assert "".join(piece["text"] for piece in pieces) == plain["content"][0]["text"]


async def test_count_tokens_equals_input_tokens(server: Server) -> None:
    server.say("hello")
    fields = {"messages": [USER, {"role": "assistant", "content": "a"}, USER], "system": "be"}
    count = await server.ok(f"{PATH}/count_tokens", **fields)
    answer = await server.ok(PATH, **fields, max_tokens=5)
    assert count == {"input_tokens": answer["usage"]["input_tokens"]}
    streamed = await events(server, **fields, max_tokens=5)
    assert streamed[0]["message"]["usage"]["input_tokens"] == count["input_tokens"]


async def test_fields_reach_the_engine(server: Server) -> None:
    await server.ok(PATH, **ASK, temperature=0.5, top_p=0.9, top_k=5, priority=3,
                    cache_salt="mine", metadata={"user_id": "x"}, service_tier="auto")  # fmt: skip
    (request,) = server.engine.requests
    params = request.params
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 5)
    assert (params.max_tokens, request.priority, request.salt) == (20, 3, b"mine")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 256}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
         "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [
            {"type": "tool_use", "id": "1", "name": "f", "input": "{}"}]}]},
         "messages[0].content[0].input"),
        ({"messages": [{"role": "user", "content": "hello" * 300}]}, "prompt"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"temperature": 1.1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": ["a", "b", "c", "d", "e"]}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"thinking": {"type": "banana"}}, "thinking.type"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"banana": 1}, "banana"),
        ({"stream": "yes"}, "stream"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
async def test_faults(server: Server, fields: dict[str, Any], name: str) -> None:
    message = check_error(await server.post(PATH, **ASK | fields), 400, "invalid_request_error")
    assert name in message
    assert not server.engine.requests


async def test_errors_have_anthropics_shape(make_server: MakeServer) -> None:
    server = make_server(api_keys=("right",), max_body_bytes=2048, max_queued_requests=1)
    key = {"x-api-key": "right"}
    for path in (PATH, f"{PATH}/count_tokens"):
        wrong = await server.http.post(path, json=ASK, headers={"x-api-key": "wrong"})
        check_error(wrong, 401, "authentication_error")
        check_error(await server.http.get(path, headers=key), 405, "invalid_request_error")
        large = await server.http.post(path, content=b" " * 3000, headers=key)
        check_error(large, 413, "request_too_large")
        fields = {"messages": [USER], "model": "claude"}
        fields |= {"max_tokens": 5} if path == PATH else {}
        unknown = await server.http.post(path, json=fields, headers=key)
        check_error(unknown, 404, "not_found_error")
    check_error(
        await server.http.post(f"{PATH}/batches", json={}, headers=key), 404, "not_found_error"
    )
    server.service.admission.admit([1], server.engine.stats)
    full = await server.http.post(PATH, json=ASK, headers=key)
    check_error(full, 429, "rate_limit_error")
    assert full.headers["retry-after"]
    server.service.admission.release(1)
    server.engine.error = "no room"
    check_error(await server.http.post(PATH, json=ASK, headers=key), 500, "api_error")
    server.engine.die()
    check_error(await server.http.post(PATH, json=ASK, headers=key), 503, "overloaded_error")


async def test_a_failure_on_the_way_is_the_last_event(server: Server) -> None:
    server.say("hello world, this")
    server.engine.die_after = 2
    found = await events(server, **ASK)
    assert found[-1]["type"] == "error"
    assert found[-1]["error"]["type"] == "overloaded_error"


@pytest.fixture
async def client(
    make_server: MakeServer,
) -> AsyncIterator[tuple[anthropic.AsyncAnthropic, Server]]:
    server = make_server(api_keys=("key",))
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(server.app), base_url="http://test")
    async with anthropic.AsyncAnthropic(
        api_key="key", base_url="http://test", http_client=http, max_retries=0,
        _strict_response_validation=True,
    ) as client:  # fmt: skip
        yield client, server


async def test_its_client(client: tuple[anthropic.AsyncAnthropic, Server]) -> None:
    api, server = client
    server.say("hello world, this")
    fields: dict[str, Any] = {"model": "tiny", "messages": [USER], "max_tokens": 20}
    plain = await api.messages.create(**fields)
    assert [block.text for block in plain.content if block.type == "text"] == ["hello world, this"]
    assert plain._request_id
    async with api.messages.stream(**fields) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == "hello world, this"
    assert final.content[0].to_dict() == plain.content[0].to_dict()
    assert final.usage == plain.usage
    count = await api.messages.count_tokens(model="tiny", messages=[USER])
    assert count.input_tokens == plain.usage.input_tokens


async def test_its_client_understands_errors(
    client: tuple[anthropic.AsyncAnthropic, Server],
) -> None:
    api, server = client
    with pytest.raises(anthropic.NotFoundError):
        await api.messages.create(model="claude", messages=[USER], max_tokens=5)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        await api.messages.create(model="tiny", messages=[USER], max_tokens=10_000)
    with pytest.raises(anthropic.AuthenticationError):
        await api.with_options(api_key="wrong").messages.create(
            model="tiny", messages=[USER], max_tokens=5
        )
    server.say("hello world, this")
    server.engine.die_after = 2
    with pytest.raises(anthropic.APIStatusError, match="engine"):
        async with api.messages.stream(model="tiny", messages=[USER], max_tokens=9) as stream:
            await stream.get_final_message()
