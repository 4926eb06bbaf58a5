"""Tool calls of the built-in model, which was trained to make them, by the real openai client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.e2e.conftest import MODEL


def tool(name: str, description: str, **types: str) -> dict[str, Any]:
    properties = {field: {"type": kind} for field, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(types)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


WEATHER = tool("get_weather", "Get the weather in a city.", city="string")
FOOD = tool("order_food", "Order food.", item="string", quantity="integer")
FIELDS: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 60}


def streamed(client: openai.OpenAI, **fields: Any) -> Any:
    """The final choice, as the client's own accumulator makes it."""
    with client.chat.completions.stream(**fields) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion().choices[0]


@pytest.mark.parametrize(
    ("question", "name", "arguments"),
    [
        ("What is the weather in Paris?", "get_weather", {"city": "Paris"}),
        ("Please buy 12 apples.", "order_food", None),
    ],
)
def test_a_question_becomes_a_call(
    client: openai.OpenAI, question: str, name: str, arguments: dict[str, Any] | None
) -> None:
    fields = FIELDS | {
        "messages": [{"role": "user", "content": question}],
        "tools": [WEATHER, FOOD],
    }
    plain = client.chat.completions.create(**fields).choices[0]
    assert plain.finish_reason == "tool_calls"
    assert plain.message.content is None
    (call,) = plain.message.tool_calls or []
    assert (call.type, call.function.name) == ("function", name)
    written = json.loads(call.function.arguments)
    assert written == arguments or arguments is None
    choice = streamed(client, **fields)
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    (again,) = choice.message.tool_calls
    assert (again.function.name, again.function.arguments) == (name, call.function.arguments)
    assert again.id != call.id


def test_a_result_becomes_an_answer(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "What is the weather in Paris?"}
    fields = FIELDS | {"tools": [WEATHER]}
    asked = client.chat.completions.create(messages=[question], **fields).choices[0].message
    assert asked.tool_calls
    result = json.dumps({"sky": "sunny", "degrees": 21})
    messages = [
        question,
        asked,
        {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": result},
    ]
    answer = client.chat.completions.create(messages=messages, **fields).choices[0]
    assert answer.finish_reason == "stop"
    assert "sunny" in (answer.message.content or "")
    assert "21" in (answer.message.content or "")
    assert not answer.message.tool_calls


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}])
def test_a_call_is_made_where_none_is_called_for(
    client: openai.OpenAI, sampling: dict[str, Any]
) -> None:
    fields = FIELDS | {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "tools": [WEATHER, FOOD],
        "max_tokens": 200,
        **sampling,
    }
    named = {"type": "function", "function": {"name": "order_food"}}
    for choice, finish in (("required", "tool_calls"), (named, "stop")):
        asked = fields | {"tool_choice": choice, "parallel_tool_calls": False}
        plain = client.chat.completions.create(**asked).choices[0]
        assert plain.finish_reason == finish
        (call,) = plain.message.tool_calls or []
        written = json.loads(call.function.arguments)
        if call.function.name == "order_food":
            assert set(written) == {"item", "quantity"}
            assert isinstance(written["quantity"], int)
        else:
            assert choice == "required" and isinstance(written["city"], str)
        (again,) = streamed(client, **asked).message.tool_calls
        assert again.function.arguments == call.function.arguments


def test_a_strict_tool_is_held_to_its_parameters(client: openai.OpenAI) -> None:
    """The model would say Paris."""
    weather = tool("get_weather", "Get the weather in a city.", city="string")
    weather["function"]["parameters"]["properties"]["city"] = {"enum": ["Rome", "Oslo"]}
    fields = FIELDS | {"messages": [{"role": "user", "content": "What is the weather in Paris?"}]}
    for strict in (False, True):
        weather["function"]["strict"] = strict
        choice = client.chat.completions.create(tools=[weather], **fields).choices[0]
        (call,) = choice.message.tool_calls or []
        assert (json.loads(call.function.arguments)["city"] == "Paris") == (not strict)
        assert choice.finish_reason == "tool_calls"
    free = client.chat.completions.create(
        tools=[weather], **FIELDS, messages=[{"role": "user", "content": "Hello!"}]
    )
    assert free.choices[0].message.content
    assert not free.choices[0].message.tool_calls


def test_without_need_no_call(client: openai.OpenAI) -> None:
    fields = FIELDS | {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER],
        "tool_choice": "none",
    }
    message = client.chat.completions.create(**fields).choices[0].message
    assert not message.tool_calls
    assert (message.content or "").startswith("<tool_call>")
