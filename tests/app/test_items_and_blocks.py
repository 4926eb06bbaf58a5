"""Reasoning, text and calls as items of a response and as blocks of a message; both clients."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx2
import openai

from tests.app.conftest import MakeTurnServer, Server
from tests.app.test_messages import events as message_events
from tests.app.test_responses import events as response_events
from tests.app.turn_formats import HERMES

ARGUMENTS = '{"city": "Zürich 😀", "n": [1, {}]}'
TURN = (
    "<think>\nLet me see.\n</think>\n\nI look.\n"
    f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
OPENAI_TOOLS = [
    {"type": "function", "name": "get_weather", "parameters": SCHEMA},
    {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False},
]
ANTHROPIC_TOOLS = [
    {"name": "get_weather", "description": "weather", "input_schema": SCHEMA},
    {"name": "f", "input_schema": {"type": "object"}},
]
USER = {"role": "user", "content": "hi"}
RESPONSE: dict[str, Any] = {"input": "hi", "tools": OPENAI_TOOLS}
MESSAGE: dict[str, Any] = {"messages": [USER], "tools": ANTHROPIC_TOOLS, "max_tokens": 500}


def prompt_text(server: Server) -> str:
    ids = server.engine.requests[-1].prompt
    return str(server.service.tokenizer.backend.decode(ids, skip_special_tokens=False))


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in items]


async def test_items(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    server.say(TURN)
    plain = await server.ok("/v1/responses", **RESPONSE)
    assert [item["type"] for item in plain["output"]] == [
        "reasoning", "message", "function_call", "function_call"
    ]  # fmt: skip
    reasoning, message, call, other = plain["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    assert message["content"][0]["text"] == "I look."
    assert (call["name"], call["arguments"]) == ("get_weather", ARGUMENTS)
    assert (other["name"], other["arguments"]) == ("f", "{}")
    assert len({item["id"] for item in plain["output"]}) == 4
    assert call["call_id"] != other["call_id"]
    assert plain["status"] == "completed"
    assert plain["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    for tokens_per_step in (1, 3, 1000):
        server.engine.tokens_per_step = tokens_per_step
        found = await response_events(server, **RESPONSE)
        final = found[-1]["response"]
        assert found[-1]["type"] == "response.completed"
        assert without_ids(final["output"]) == without_ids(plain["output"])
        assert final["usage"] == plain["usage"]
        check_item_events(found, final["output"])


def check_item_events(found: list[dict[str, Any]], items: list[dict[str, Any]]) -> None:
    """Each item is added, grows and is done before the next begins; its events say its id."""
    expected_kinds = {
        "message": ("content_part.added", "output_text.delta", "output_text.done",
                    "content_part.done"),
        "reasoning": ("content_part.added", "reasoning_text.delta", "reasoning_text.done",
                      "content_part.done"),
        "function_call": ("function_call_arguments.delta", "function_call_arguments.done"),
    }  # fmt: skip
    for index, item in enumerate(items):
        mine = [event for event in found if event.get("output_index") == index]
        numbers = [event["sequence_number"] for event in mine]
        assert numbers == list(range(numbers[0], numbers[0] + len(mine)))
        assert mine[0]["type"] == "response.output_item.added"
        assert mine[0]["item"]["id"] == item["id"]
        assert mine[0]["item"]["status"] == "in_progress"
        assert mine[-1]["type"] == "response.output_item.done"
        assert mine[-1]["item"] == item
        kinds = [event["type"].removeprefix("response.") for event in mine[1:-1]]
        assert tuple(dict.fromkeys(kinds)) == expected_kinds[item["type"]]
        assert {event["item_id"] for event in mine[1:-1]} == {item["id"]}
        pieces = "".join(event.get("delta", "") for event in mine)
        whole = item.get("arguments") or item.get("content", [{}])[0].get("text")
        assert pieces == whole


async def test_a_response_goes_on_after_its_calls(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    server.say(TURN)
    first = await server.ok("/v1/responses", **RESPONSE)
    calls = [item for item in first["output"] if item["type"] == "function_call"]
    outputs = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": "ok"}
        for call in calls
    ]
    server.say("done")
    fields = {"tools": OPENAI_TOOLS, "previous_response_id": first["id"]}
    second = await server.ok("/v1/responses", input=outputs, **fields)
    text = prompt_text(server)
    assert "<think>\nLet me see.\n</think>\n\nI look." in text
    assert '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|end|><|tool|>ok' in text
    listed = (await server.http.get(f"/v1/responses/{second['id']}/input_items")).json()
    assert [item["type"] for item in listed["data"]] == [
        "function_call_output", "function_call_output", "function_call", "function_call",
        "message", "reasoning", "message",
    ]  # fmt: skip
    # The same conversation sent as a whole is the same prompt.
    whole = [{"role": "user", "content": "hi"}, *first["output"], *outputs]
    prompt = server.engine.requests[-1].prompt
    await server.ok("/v1/responses", input=whole, tools=OPENAI_TOOLS)
    assert server.engine.requests[-1].prompt == prompt


async def test_a_call_that_was_cut_is_incomplete_and_not_continued(
    make_turn_server: MakeTurnServer,
) -> None:
    server = make_turn_server(HERMES)
    server.say(TURN)
    whole = await server.ok("/v1/responses", **RESPONSE)
    most = whole["usage"]["output_tokens"] - 25
    cut = await server.ok("/v1/responses", **RESPONSE, max_output_tokens=most)
    assert cut["status"] == "incomplete"
    assert cut["output"][-1]["status"] == "incomplete"
    assert all(item["status"] == "completed" for item in cut["output"][:-1])
    await server.ok("/v1/responses", input="go on", previous_response_id=cut["id"])


async def test_blocks(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    server.say(TURN)
    plain = await server.ok("/v1/messages", **MESSAGE)
    thinking, text, call, other = plain["content"]
    assert thinking == {"type": "thinking", "thinking": "Let me see.", "signature": ""}
    assert text == {"type": "text", "text": "I look."}
    assert (call["type"], call["name"]) == ("tool_use", "get_weather")
    assert call["input"] == json.loads(ARGUMENTS)
    assert (other["name"], other["input"]) == ("f", {})
    assert call["id"] != other["id"]
    assert plain["stop_reason"] == "tool_use"
    found = await message_events(server, **MESSAGE)
    blocks: list[dict[str, Any]] = []
    pieces: list[str] = []
    for event in found:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"])
                pieces.append("")
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1
                delta = dict(event["delta"])
                kind = delta.pop("type")
                assert kind in ("thinking_delta", "signature_delta", "text_delta",
                                "input_json_delta")  # fmt: skip
                pieces[-1] += next(iter(delta.values()))
    assert blocks[2]["input"] == {} and blocks[0]["thinking"] == "" and blocks[1]["text"] == ""
    assert pieces == ["Let me see.", "I look.", ARGUMENTS, "{}"]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"


async def test_a_message_goes_on_after_its_calls(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    server.say(TURN)
    first = await server.ok("/v1/messages", **MESSAGE)
    results = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": "ok"}
        for block in first["content"]
        if block["type"] == "tool_use"
    ]
    server.say("done")
    messages = [
        USER, {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": results},
    ]  # fmt: skip
    fields = {"messages": messages, "tools": ANTHROPIC_TOOLS}
    second = await server.ok("/v1/messages", **fields, max_tokens=5)
    assert '{"name": "f", "arguments": {}}\n</tool_call><|end|><|tool|>ok' in prompt_text(server)
    count = await server.ok("/v1/messages/count_tokens", **fields)
    assert count["input_tokens"] == second["usage"]["input_tokens"]


async def test_thinking_can_be_asked_for(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    server.say("hm</think>\n\nwell")
    for kind, opened in (("enabled", True), ("adaptive", True), ("disabled", False)):
        thinking = {"type": kind} | ({"budget_tokens": 50} if kind == "enabled" else {})
        answer = await server.ok("/v1/messages", **MESSAGE, thinking=thinking)
        assert prompt_text(server).endswith("<think>\n") is opened
        assert (answer["content"][0]["type"] == "thinking") is opened


async def test_openais_client(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    server.say(TURN)
    api = openai.AsyncOpenAI(
        api_key="key", base_url="http://test/v1", http_client=server.http, max_retries=0,
        _strict_response_validation=True,
    )  # fmt: skip
    plain = await api.responses.create(model="tiny", **RESPONSE)
    async with api.responses.stream(model="tiny", **RESPONSE) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_response()
    kinds = ["reasoning", "message", "function_call", "function_call"]
    assert [item.type for item in plain.output] == [item.type for item in final.output] == kinds
    assert plain.output_text == final.output_text == "I look."
    assert await api.responses.retrieve(plain.id) == plain


async def test_anthropics_client(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    server.say(TURN)
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(server.app), base_url="http://test")
    async with anthropic.AsyncAnthropic(
        api_key="key", base_url="http://test", http_client=http, max_retries=0,
        _strict_response_validation=True,
    ) as api:  # fmt: skip
        plain = await api.messages.create(model="tiny", **MESSAGE)
        async with api.messages.stream(model="tiny", **MESSAGE) as stream:
            final = await stream.get_final_message()
    kinds = ["thinking", "text", "tool_use", "tool_use"]
    assert [b.type for b in plain.content] == [b.type for b in final.content] == kinds
    assert plain.stop_reason == final.stop_reason == "tool_use"
    inputs = [[b.input for b in m.content if b.type == "tool_use"] for m in (plain, final)]
    assert inputs == [[json.loads(ARGUMENTS), {}]] * 2
