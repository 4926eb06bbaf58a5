"""Structured output over HTTP, from the real model: whatever it would rather say."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.e2e.conftest import MODEL

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "é", 3, None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def response_format(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": "Who are you?"}]
    return client.chat.completions.create(
        **{"model": MODEL, "messages": messages, "max_tokens": 200, **fields}
    )


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 2, "seed": 5}])
def test_a_schema_is_kept(client: openai.OpenAI, sampling: dict[str, Any]) -> None:
    plain = ask(client, response_format=response_format(PERSON), **sampling).choices[0]
    assert plain.finish_reason == "stop"
    value = json.loads(plain.message.content)
    jsonschema.validate(value, PERSON)
    assert list(value) == ["name", "age", "tags"]
    chunks = ask(client, response_format=response_format(PERSON), stream=True, **sampling)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == plain.message.content
