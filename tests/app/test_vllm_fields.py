"""Fields beyond OpenAI's that vLLM's users know: honoured here, too."""

from __future__ import annotations

from typing import Any

import pytest

from tests.app.conftest import MakeTurnServer, Server
from tests.app.turn_formats import HERMES

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hello world"}
BOTH = pytest.mark.parametrize(
    ("path", "prompt"),
    [(COMPLETIONS, {"prompt": "hello world"}), (CHAT, {"messages": [USER]})],
    ids=["completions", "chat"],
)


@BOTH
async def test_allowed_token_ids_reach_the_engine(
    server: Server, path: str, prompt: dict[str, Any]
) -> None:
    await server.ok(path, **prompt, allowed_token_ids=[7, 3, 7], max_tokens=1)
    assert server.engine.requests[-1].params.allowed_token_ids == (7, 3, 7)


@BOTH
async def test_the_end_of_a_long_prompt_is_used(
    server: Server, path: str, prompt: dict[str, Any]
) -> None:
    await server.ok(path, **prompt, max_tokens=3)
    whole = server.engine.requests[-1].prompt
    for keep, expected in ((2, whole[-2:]), (10_000, whole), (-1, whole)):
        answer = await server.ok(path, **prompt, max_tokens=3, truncate_prompt_tokens=keep)
        assert server.engine.requests[-1].prompt == expected
        assert answer["usage"]["prompt_tokens"] == len(expected)


@BOTH
async def test_the_beginning_of_a_long_prompt_is_used(
    server: Server, path: str, prompt: dict[str, Any]
) -> None:
    await server.ok(path, **prompt, max_tokens=3)
    whole = server.engine.requests[-1].prompt
    for keep in (2, 10_000, -1):
        fields = {"truncate_prompt_tokens": keep, "truncation_side": "right"}
        await server.ok(path, **prompt, max_tokens=3, **fields)
        assert server.engine.requests[-1].prompt == whole[: keep if keep > 0 else None]


@BOTH
async def test_bad_words_reach_the_engine_as_tokens(
    server: Server, path: str, prompt: dict[str, Any]
) -> None:
    expected = [tuple(server.ids(text)) for text in ("world", " world", "a", " a")]
    assert [len(tokens) for tokens in expected] == [2, 1, 1, 1]
    await server.ok(path, **prompt, bad_words=[" world", "a", "world"], max_tokens=1)
    assert server.engine.requests[-1].params.bad_words == tuple(expected)


async def test_minus_one_keeps_what_fits_with_the_output(server: Server) -> None:
    for prompt in ("hello world " * 5000, [70] * 5000):
        fields = {"prompt": prompt, "truncate_prompt_tokens": -1}
        await server.ok(COMPLETIONS, **fields)
        assert len(server.engine.requests[-1].prompt) == 256 - 16
        await server.ok(COMPLETIONS, **fields, max_tokens=100)
        assert len(server.engine.requests[-1].prompt) == 256 - 100
    response = await server.post(COMPLETIONS, prompt=[70] * 300, truncate_prompt_tokens=260)
    assert response.status_code == 400


async def test_tokens_as_ids(server: Server) -> None:
    server.say("hello world")
    first, second = server.ids("hello world")
    names = [f"token_id:{first}", f"token_id:{second}"]
    fields = {"return_tokens_as_token_ids": True}
    (choice,) = (await server.ok(COMPLETIONS, prompt="a", logprobs=1, **fields))["choices"]
    assert choice["text"] == "hello world"
    assert choice["logprobs"]["tokens"] == names
    assert names[0] in choice["logprobs"]["top_logprobs"][0]
    logprobs = {"logprobs": True, "top_logprobs": 1}
    (choice,) = (await server.ok(CHAT, messages=[USER], **logprobs, **fields))["choices"]
    entries = choice["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == names
    assert bytes(entries[0]["bytes"]) == b"hello"
    assert all(t["token"].startswith("token_id:") for t in entries[0]["top_logprobs"])


async def test_prompt_logprobs(server: Server) -> None:
    fields = {"prompt_logprobs": 2, "n": 2, "max_tokens": 2, "seed": 1}
    plain = await server.ok(COMPLETIONS, prompt=["hello world", "hello"], **fields)
    first, second = server.ids("hello world")
    for choice in plain["choices"][:2]:
        nothing, found = choice["prompt_logprobs"]
        assert nothing is None
        assert found[str(second)] == {"logprob": -1.25, "rank": 3, "decoded_token": " world"}
        assert [entry["rank"] for entry in found.values()] == [3, 1, 2]
    assert plain["choices"][2]["prompt_logprobs"] == [None]
    chat = await server.ok(CHAT, messages=[USER], **fields)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in await server.ok(CHAT, messages=[USER], max_tokens=2)
    assert first != second


async def test_echo_lists_as_many_as_it_asked_for(server: Server) -> None:
    fields = {"prompt": "hello world", "echo": True, "logprobs": 1, "max_tokens": 1}
    alone = await server.ok(COMPLETIONS, **fields, seed=1)
    beside = await server.ok(COMPLETIONS, **fields, seed=1, prompt_logprobs=5)
    assert beside["choices"][0]["logprobs"] == alone["choices"][0]["logprobs"]


@BOTH
@pytest.mark.parametrize("stream", [False, True])
async def test_request_id(server: Server, path: str, prompt: dict[str, Any], stream: bool) -> None:
    fields = {"max_tokens": 1, "request_id": "mine-1", "stream": stream}
    response = await server.http.post(
        path, json=prompt | fields, headers={"x-request-id": "header"}
    )
    assert response.headers["x-request-id"] == "mine-1"
    assert f"{'chat' if path == CHAT else ''}cmpl-mine-1" in response.text


@BOTH
@pytest.mark.parametrize("stop", [None, "wor", ["this", "zzz"]])
async def test_token_ids(
    server: Server, path: str, prompt: dict[str, Any], stop: str | list[str] | None
) -> None:
    """The prompt's are exactly the engine's, the output's as many as usage counts."""
    server.say("hello world, this")
    fields = {**prompt, "return_token_ids": True, "stop": stop, "n": 2}
    plain = await server.ok(path, **fields)
    expected = [*server.ids("hello world, this"), 0][: plain["usage"]["completion_tokens"] // 2]
    assert [choice["token_ids"] for choice in plain["choices"]] == [expected] * 2
    asked = server.engine.requests[-1].prompt
    for tokens_per_step in (1, 2, 1000):
        server.engine.tokens_per_step = tokens_per_step
        chunks = await server.events(path, **fields)
        for index in range(2):
            mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            assert [i for c in mine for i in c.get("token_ids", ())] == expected
        if path == CHAT:
            assert plain["prompt_token_ids"] == chunks[0]["prompt_token_ids"] == asked
        else:
            first = chunks[0]["choices"][0]
            assert plain["choices"][0]["prompt_token_ids"] == first["prompt_token_ids"] == asked
            assert sum("prompt_token_ids" in c["choices"][0] for c in chunks) == 2


async def test_token_ids_of_calls(make_turn_server: MakeTurnServer) -> None:
    server = make_turn_server(HERMES)
    text = 'I look.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    server.say(text)
    tools = [{"type": "function", "function": {"name": "f"}}]
    fields = {"messages": [USER], "tools": tools, "return_token_ids": True}
    (choice,) = (await server.ok(CHAT, **fields))["choices"]
    assert choice["message"]["tool_calls"]
    assert choice["token_ids"] == [*server.ids(text), 0]
    chunks = await server.events(CHAT, **fields)
    assert [i for c in chunks for i in c["choices"][0].get("token_ids", ())] == choice["token_ids"]
