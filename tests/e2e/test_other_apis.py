"""OpenAI's Responses and Anthropic's Messages on the real model, by their own clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import openai
import pytest

from tests.e2e.conftest import MODEL
from tests.e2e.server_process import ServerProcess

QUESTION = "What is the capital of France?"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


@pytest.fixture
def claude(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=server.url, api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


def test_a_conversation_by_responses(client: openai.OpenAI, server: ServerProcess) -> None:
    fields: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 60}
    first = client.responses.create(input=QUESTION, **fields)
    assert first.status == "completed" and "Paris" in first.output_text
    with client.responses.stream(input=QUESTION, **fields) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == first.output_text
    assert first.usage is not None and final.usage is not None
    assert final.usage.input_tokens == first.usage.input_tokens
    more = client.responses.create(input="And of Italy?", previous_response_id=first.id, **fields)
    whole = client.chat.completions.create(
        model=MODEL,
        temperature=0,
        max_tokens=60,
        messages=[
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And of Italy?"},
        ],
    )
    assert more.output_text == whole.choices[0].message.content
    assert more.usage is not None and whole.usage is not None
    assert more.usage.input_tokens == whole.usage.prompt_tokens > first.usage.input_tokens
    assert client.responses.retrieve(more.id) == more
    server.wait_idle()


def test_a_cut_response_says_why(client: openai.OpenAI) -> None:
    cut = client.responses.create(model=MODEL, input="Tell me a story.", max_output_tokens=5)
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    assert cut.usage is not None and cut.usage.output_tokens == 5


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_schema_is_kept(
    client: openai.OpenAI, claude: anthropic.Anthropic, temperature: int
) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}}
    fields: dict[str, Any] = {"model": MODEL, "temperature": temperature}
    response = client.responses.create(
        input=QUESTION, text=text, max_output_tokens=100, **fields, extra_body={"seed": 1}
    )
    output: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    message = claude.messages.create(
        model=MODEL,
        max_tokens=100,
        messages=[{"role": "user", "content": QUESTION}],
        output_config=output,
        extra_body={"temperature": temperature},
    )
    (block,) = message.content
    assert block.type == "text"
    for found in (response.output_text, block.text):
        jsonschema.validate(json.loads(found), SCHEMA)


def test_a_bad_schema_is_named_by_its_own_field(
    client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    bad = {"type": "string", "pattern": "("}
    text: Any = {"format": {"type": "json_schema", "name": "answer", "schema": bad}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=MODEL, input="a", text=text)
    assert str(refused.value.param).startswith("text.format.schema")
    output: Any = {"format": {"type": "json_schema", "schema": bad}}
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format\.schema"):
        claude.messages.create(
            model=MODEL,
            max_tokens=9,
            messages=[{"role": "user", "content": "a"}],
            output_config=output,
        )


def test_messages(claude: anthropic.Anthropic, server: ServerProcess) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "system": "You are helpful.",
    }
    greedy = {"temperature": 0}
    plain = claude.messages.create(**asked, max_tokens=60, extra_body=greedy)
    (block,) = plain.content
    assert block.type == "text" and "Paris" in block.text
    assert plain.stop_reason == "end_turn"
    with claude.messages.stream(**asked, max_tokens=60, extra_body=greedy) as stream:
        assert "".join(stream.text_stream) == block.text
        assert stream.get_final_message().usage == plain.usage
    assert claude.messages.count_tokens(**asked).input_tokens == plain.usage.input_tokens
    stop = block.text[3:7]
    cut = claude.messages.create(**asked, max_tokens=60, stop_sequences=[stop], extra_body=greedy)
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    start = " ".join(block.text.split(" ")[:3])
    begun = [*asked["messages"], {"role": "assistant", "content": start}]
    rest = claude.messages.create(**asked | {"messages": begun}, max_tokens=60, extra_body=greedy)
    assert rest.content[0].type == "text"
    assert start + rest.content[0].text == block.text
    server.wait_idle()


def test_cached_tokens_are_told_apart_for_who_asks(claude: anthropic.Anthropic) -> None:
    content: Any = [{"type": "text", "text": "A prompt of its own, which is long. " * 20}]
    asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
    count = claude.messages.count_tokens(**asked).input_tokens
    first = claude.messages.create(**asked, max_tokens=1).usage
    again = claude.messages.create(**asked, max_tokens=1).usage
    assert first.input_tokens == again.input_tokens == count
    assert first.cache_read_input_tokens == again.cache_read_input_tokens == 0
    marked = claude.messages.create(
        **asked, max_tokens=1, cache_control={"type": "ephemeral"}
    ).usage
    content[0]["cache_control"] = {"type": "ephemeral"}
    with claude.messages.stream(**asked, max_tokens=1) as stream:
        assert stream.get_final_message().usage == marked
    assert marked.cache_read_input_tokens is not None and marked.cache_read_input_tokens > count / 2
    assert marked.input_tokens + marked.cache_read_input_tokens == count


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
CLOCK = {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]}
SCHEMAS = {"get_weather": WEATHER, "get_time": CLOCK}


@pytest.mark.parametrize("named", [None, "get_time"])
def test_calls_that_a_response_demands_are_made(client: openai.OpenAI, named: str | None) -> None:
    tools: Any = [
        {"type": "function", "name": name, "parameters": schema, "strict": False}
        for name, schema in SCHEMAS.items()
    ]
    fields: dict[str, Any] = {
        "model": MODEL,
        "input": QUESTION,
        "tools": tools,
        "tool_choice": {"type": "function", "name": named} if named else "required",
        "temperature": 0,
        "max_output_tokens": 300,
    }
    plain = client.responses.create(**fields)
    calls = [item for item in plain.output if item.type == "function_call"]
    assert calls and len(calls) == len(plain.output)
    for call in calls:
        assert named in (None, call.name)
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    with client.responses.stream(**fields) as stream:
        pieces: dict[str, str] = {}
        for event in stream:
            if event.type == "response.function_call_arguments.delta":
                pieces[event.item_id] = pieces.get(event.item_id, "") + event.delta
        final = stream.get_final_response()
    streamed = {item.id: item for item in final.output if item.type == "function_call"}
    assert {id: item.arguments for id, item in streamed.items()} == pieces
    assert [(c.name, c.arguments) for c in streamed.values()] == [
        (c.name, c.arguments) for c in calls
    ]


@pytest.mark.parametrize("named", [None, "get_weather"])
def test_calls_that_a_message_demands_are_made(
    claude: anthropic.Anthropic, named: str | None
) -> None:
    choice: Any = {"type": "tool", "name": named} if named else {"type": "any"}
    fields: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "tools": [{"name": n, "input_schema": schema} for n, schema in SCHEMAS.items()],
        "tool_choice": choice | {"disable_parallel_tool_use": True},
        "max_tokens": 300,
        "extra_body": {"temperature": 0},
    }
    plain = claude.messages.create(**fields)
    assert plain.stop_reason == "tool_use"
    (block,) = plain.content
    assert block.type == "tool_use" and named in (None, block.name)
    jsonschema.validate(block.input, SCHEMAS[block.name])
    with claude.messages.stream(**fields) as stream:
        text = ""
        for event in stream:
            if event.type == "content_block_delta" and event.delta.type == "input_json_delta":
                text += event.delta.partial_json
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use"
    assert json.loads(text) == streamed.input == block.input
    assert streamed.name == block.name
