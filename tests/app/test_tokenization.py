"""`/tokenize` and `/detokenize` say what the other endpoints do with a text."""

from __future__ import annotations

from typing import Any

import pytest

from tests.app.conftest import Server
from tests.app.test_bad_requests import check_error

USER = {"role": "user", "content": "hi"}


async def test_a_text(server: Server) -> None:
    ids = server.ids("hello 日本")
    answer = await server.ok("/tokenize", prompt="hello 日本", model="tiny")
    assert answer == {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}
    named = await server.ok("/tokenize", prompt="hello world", return_token_strs=True)
    assert named["token_strs"] == ["hello", "Ġworld"]
    assert (await server.ok("/tokenize", prompt=""))["tokens"] == []


async def test_a_chat_is_what_the_chat_endpoint_computes(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for fields in (
        {},
        {"tools": [tool]},
        {"chat_template_kwargs": {"suffix": " well"}},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
    ):
        answer = await server.ok("/tokenize", messages=[USER], **fields)
        more = {"tool_choice": "none"} if "tools" in fields else {}
        await server.ok("/v1/chat/completions", messages=[USER], max_tokens=1, **fields, **more)
        assert answer["tokens"] == server.engine.requests[-1].prompt
        assert answer["count"] == len(answer["tokens"])


async def test_a_text_longer_than_the_context_is_counted(server: Server) -> None:
    answer = await server.ok("/tokenize", prompt="hello world " * 5000)
    assert answer["count"] > 10_000 > answer["max_model_len"]


async def test_there_and_back(server: Server) -> None:
    text = "<|user|>naïve 日本語 😀<|end|>"
    ids = (await server.ok("/tokenize", prompt=text))["tokens"]
    assert await server.ok("/detokenize", tokens=ids) == {"prompt": text}
    assert await server.ok("/detokenize", tokens=[]) == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "messages"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ("/tokenize", {"messages": [USER], "tools": [{}]}, "tools[0].type"),
        ("/tokenize", {"messages": [USER], "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": [USER], "continue_final_message": True},
         "continue_final_message"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "banana": 1}, "banana"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, True]}, "tokens[1]"),
        ("/detokenize", {"tokens": [1.0]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [400]}, "tokens"),
        ("/detokenize", {"tokens": [2**70]}, "tokens"),
        ("/detokenize", {"tokens": [1], "prompt": "a"}, "prompt"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
async def test_faults(server: Server, path: str, fields: dict[str, Any], param: str) -> None:
    check_error(await server.post(path, **fields), 400, param)


async def test_unknown_models(server: Server) -> None:
    for path, fields in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        check_error(await server.post(path, model="other", **fields), 404, "model")
