"""Requests to every generating endpoint whose answers can be compared, however they were cut.

The same request has the same answer plain and streamed, alone and in a crowd, before and after a
crash of the engine: `answer` brings it into one form.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "scores": {"type": "array", "items": {"type": "integer"}, "minItems": 20, "maxItems": 40},
    },
    "required": ["name", "scores"],
    "additionalProperties": False,
}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "minLength": 40, "maxLength": 80}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}


@dataclass(frozen=True)
class Case:
    """One request. `body` lacks only `stream`."""

    path: str
    body: dict[str, Any]


def case(index: int, tokens: int) -> Case:
    """The request number `index`; kinds take turns, and each has a seed and words of its own."""
    words = f"Story {index}: once upon a time"
    chat = {"messages": [{"role": "user", "content": words}]}
    drawn = {"temperature": 0.9, "seed": index, "ignore_eos": True, "max_tokens": tokens}
    greedy = drawn | {"temperature": 0}
    completions, chats = "/v1/completions", "/v1/chat/completions"
    responses, messages = "/v1/responses", "/v1/messages"
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    text = {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}
    tools = {"tools": [TOOL], "tool_choice": "required"}
    kinds = [
        Case(completions, greedy | {"prompt": words, "logprobs": 2}),
        Case(completions, drawn | {"prompt": words, "n": 2, "frequency_penalty": 0.5}),
        Case(completions, drawn | {"prompt": words, "echo": True, "logprobs": 1}),
        Case(completions, drawn | {"prompt": words, "stop": ["fox", " the e"]}),
        Case(chats, drawn | chat | {"logprobs": True, "top_logprobs": 3}),
        Case(chats, greedy | chat),
        Case(chats, drawn | chat | {"response_format": schema, "ignore_eos": False}),
        Case(chats, drawn | chat | tools | {"ignore_eos": False}),
        Case(
            responses,
            {
                "input": words, "max_output_tokens": tokens, "temperature": 0.9, "seed": index,
                "text": text,
            },
        ),
        Case(
            responses,
            {
                "input": words, "max_output_tokens": tokens, "temperature": 0,
                "tools": [{"type": "function", **FUNCTION}], "tool_choice": "required",
            },
        ),
        Case(messages, chat | {"max_tokens": tokens, "temperature": 0}),
        Case(
            messages,
            chat
            | {
                "max_tokens": tokens, "temperature": 0, "tool_choice": {"type": "any"},
                "tools": [{"name": "get_weather", "input_schema": PARAMETERS}],
            },
        ),
    ]  # fmt: skip
    return kinds[index % len(kinds)]


async def answer(client: httpx.AsyncClient, case: Case, *, stream: bool) -> Any:
    """What the model said, in one form. Raises `AssertionError` if the answer is not whole."""
    if not stream:
        response = await client.post(case.path, json=case.body)
        assert response.status_code == 200, response.text
        return _plain(case.path, response.json())
    events = [event async for event in stream_of(client, case)]
    if case.path == "/v1/responses":
        return _response_stream(events)
    if case.path == "/v1/messages":
        return _message_stream(events)
    assert events.pop() == "[DONE]"
    return _choices(events)


async def stream_of(client: httpx.AsyncClient, case: Case) -> AsyncIterator[Any]:
    """The data of a stream's events as they come; [DONE] as text."""
    body = case.body | {"stream": True}
    async with client.stream("POST", case.path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                yield data if data == "[DONE]" else json.loads(data)


def _plain(path: str, body: dict[str, Any]) -> Any:
    if path == "/v1/responses":
        return _response(body)
    if path == "/v1/messages":
        return [[_block(block) for block in body["content"]], body["stop_reason"]]
    return _choices([body])


def _choices(chunks: list[Any]) -> Any:
    """By choice: text, calls, log-probabilities and how it ended."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            one = found.setdefault(
                choice["index"], {"text": "", "calls": {}, "logprobs": [], "finish": None}
            )
            assert one["finish"] is None, "news after the end"
            said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            one["text"] += said.get("content") or ""
            for place, call in enumerate(said.get("tool_calls") or ()):
                made = one["calls"].setdefault(call.get("index", place), ["", ""])
                made[0] += call["function"].get("name") or ""
                made[1] += call["function"].get("arguments") or ""
            one["logprobs"] += _logprobs(choice.get("logprobs") or {})
            one["finish"] = choice["finish_reason"]
    assert all(one["finish"] for one in found.values()), "a choice has no end"
    return found


def _logprobs(logprobs: dict[str, Any]) -> list[Any]:
    if "content" in logprobs:
        return list(logprobs["content"])
    columns = (logprobs.get(c) or [] for c in ("tokens", "token_logprobs", "text_offset"))
    return [list(row) for row in zip(*columns, strict=True)]


def _response(body: dict[str, Any]) -> Any:
    def item(found: dict[str, Any]) -> list[Any]:
        if found["type"] == "function_call":
            return [found["name"], found["arguments"]]
        return [part["text"] for part in found["content"]]

    assert body["status"] in ("completed", "incomplete"), body
    return [[item(found) for found in body["output"]], body["status"]]


def _response_stream(events: list[Any]) -> Any:
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    result = _response(events[-1]["response"])
    deltas = "".join(event["delta"] for event in events if event["type"].endswith(".delta"))
    assert deltas == "".join(item[-1] for item in result[0])
    return result


def _block(block: dict[str, Any]) -> Any:
    return block["text"] if block["type"] == "text" else [block["name"], block["input"]]


def _message_stream(events: list[Any]) -> Any:
    assert events[-1]["type"] == "message_stop", events[-1]
    blocks: list[Any] = []
    reason = None
    for event in events:
        match event["type"]:
            case "content_block_start":
                blocks.append(dict(event["content_block"]))
                blocks[-1]["json"] = ""
            case "content_block_delta":
                delta = event["delta"]
                blocks[-1]["text"] = blocks[-1].get("text", "") + delta.get("text", "")
                blocks[-1]["json"] += delta.get("partial_json", "")
            case "message_delta":
                reason = event["delta"]["stop_reason"]
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["json"]) if reason != "max_tokens" else block["json"]
    return [[_block(block) for block in blocks], reason]
