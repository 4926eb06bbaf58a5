"""Every client fault is a 4xx with all four keys, names the field, and the server goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.app.conftest import MakeServer, Server

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


def check_error(response: Any, status: int, param: str | None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert isinstance(error["code"], str | None)
    assert error["param"] == param
    return error


BODIES = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"17",
    b"{",
    b'{"prompt": "a"} trailing',
    b"[NaN]",
    b"NaN",
    b'{"a": NaN',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b"[" * 100_000,
    b'{"prompt":' * 100_000,
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:30]))
async def test_bodies_that_are_no_json_object(server: Server, path: str, body: bytes) -> None:
    response = await server.http.post(path, content=body)
    check_error(response, 400, None)
    server.say("fine")
    assert (await server.ok(COMPLETIONS, prompt="a"))["choices"][0]["text"] == "fine"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "a", "temperature": Infinity}', "temperature"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "a", "max_tokens": -1e999}', "max_tokens"),
        (b'{"prompt": "a", "logit_bias": {"5": NaN}}', "logit_bias"),
        (b'{"prompt": [1, NaN]}', "prompt"),
    ],
)
async def test_numbers_that_are_not_finite(
    server: Server, path: str, body: bytes, param: str
) -> None:
    check_error(await server.http.post(path, content=body), 400, param)


async def test_a_large_body_is_not_searched_for_them(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[bytes] = []
    monkeypatch.setattr("app.http.body._not_finite", searched.append)
    body = b'{"prompt": "%b", "temperature": 1e999}' % (b"a" * 65536)
    check_error(await server.http.post(COMPLETIONS, content=body), 400, None)
    assert searched == []


async def test_a_fairness_header_that_comes_twice_is_refused(server: Server) -> None:
    name = "x-gateway-inference-fairness-id"
    for values in (("a", "b"), ("", "b")):
        answer = await server.http.post(
            "/v1/completions", json={"prompt": "a"}, headers=[(name, value) for value in values]
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == name
    assert server.engine.requests == []


COMMON: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_p": -0.01}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 1.0}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 2**70}, "max_tokens"),
    ({"max_tokens": 256}, "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"what": True}}, "stream_options.what"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": [5]}, "stop[0]"),
    ({"stop_token_ids": [100_000]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [True]}, "stop_token_ids[0]"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "logit_bias"),
    ({"logit_bias": {"abc": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"400": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"0" * 12 + "400": 1}}, "logit_bias"),
    ({"logit_bias": {"0" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"ignore_eos": "true"}, "ignore_eos"),
    ({"user": 5}, "user"),
    ({"metadata": "x"}, "metadata"),
    ({"store": "x"}, "store"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"priority": 0.5}, "priority"),
    ({"model": 5}, "model"),
    ({"banana": 1}, "banana"),
    ({"banana": None}, "banana"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"bad_words": "a"}, "bad_words"),
    ({"bad_words": ["a", ""]}, "bad_words[1]"),
    ({"bad_words": ["a", " \n"]}, "bad_words[1]"),
    ({"bad_words": ["a" * 257]}, "bad_words[0]"),
    ({"bad_words": ["a"] * 257}, "bad_words"),
    ({"truncation_side": "middle"}, "truncation_side"),
    ({"return_token_ids": 1}, "return_token_ids"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [400]}, "allowed_token_ids"),
    ({"allowed_token_ids": [True]}, "allowed_token_ids[0]"),
    ({"allowed_token_ids": [0], "min_tokens": 1, "max_tokens": 2}, "allowed_token_ids"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 2.0}, "truncate_prompt_tokens"),
    ({"return_tokens_as_token_ids": 1}, "return_tokens_as_token_ids"),
    ({"request_id": ""}, "request_id"),
    ({"request_id": "a b"}, "request_id"),
    ({"request_id": "a\n"}, "request_id"),
    ({"request_id": "a\r\nset-cookie: x"}, "request_id"),
    ({"request_id": "x" * 201}, "request_id"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"guided_regex": "a", "allowed_token_ids": [1]}, "allowed_token_ids"),
]


@pytest.mark.parametrize(("fields", "param"), COMMON, ids=str)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_fields_of_both(server: Server, path: str, fields: dict, param: str) -> None:
    prompt = {"prompt": "hello"} if path == COMPLETIONS else {"messages": [USER]}
    check_error(await server.post(path, **prompt, **fields), 400, param)
    assert not server.engine.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": [[1], [True]]}, "prompt[1]"),
        ({"prompt": [[1], [2, "a"]]}, "prompt[1]"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [400]}, "prompt"),
        ({"prompt": [[1], [2**70]]}, "prompt[1]"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": "hello" * 300}, "prompt"),
        ({"prompt": [1] * 256}, "prompt"),
        ({"prompt": "x" * 3_000_000}, "prompt"),
        ({"prompt": [1] * 255, "max_tokens": 2}, "max_tokens"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "echo": 1}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": ["a"] * 9, "n": 128}, "n"),
        ({"prompt": "a", "messages": [USER]}, "messages"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_completion_fields(server: Server, fields: dict, param: str) -> None:
    check_error(await server.post(COMPLETIONS, **fields), 400, param)
    assert not server.engine.requests


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text",
        ),
        ({"messages": [{**USER, "name": 5}]}, "messages[0].name"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0].function.name",
        ),
        ({"messages": [{"role": "user", "content": "hello" * 300}]}, "messages"),
        ({"messages": [USER], "max_completion_tokens": 256}, "max_completion_tokens"),
        ({"messages": [USER], "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": [USER], "top_logprobs": 2}, "top_logprobs"),
        ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": [USER], "logprobs": 1}, "logprobs"),
        ({"messages": [USER], "tool_choice": "required"}, "tool_choice"),
        ({"messages": [USER], "functions": []}, "functions"),
        ({"messages": [USER], "modalities": ["audio"]}, "modalities[0]"),
        ({"messages": [USER], "continue_final_message": True}, "continue_final_message"),
        ({"messages": [USER], "chat_template": "{{ 1 }}"}, "chat_template"),
        *(
            (
                {"messages": [USER], "chat_template_kwargs": {name: 1}},
                f"chat_template_kwargs.{name}",
            )
            for name in ("messages", "tools", "chat_template", "add_generation_prompt")
        ),
        ({"messages": [USER], "prompt": "a"}, "prompt"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_chat_fields(server: Server, fields: dict, param: str) -> None:
    check_error(await server.post(CHAT, **fields), 400, param)
    assert not server.engine.requests


@pytest.mark.parametrize("stream", [False, True])
async def test_unknown_model(server: Server, stream: bool) -> None:
    response = await server.post(COMPLETIONS, prompt="a", model="gpt-4", stream=stream)
    assert check_error(response, 404, "model")["code"] == "model_not_found"


async def test_errors_before_generation_are_plain_http_with_stream(server: Server) -> None:
    check_error(await server.post(COMPLETIONS, prompt=[1, -1], stream=True), 400, "prompt")
    server.engine.error = "no room"
    check_error(await server.post(COMPLETIONS, prompt="a", stream=True), 500, None)


async def test_unknown_paths_and_methods(server: Server) -> None:
    check_error(await server.http.get("/v1/nothing"), 404, None)
    response = await server.http.get(COMPLETIONS)
    check_error(response, 405, None)
    assert response.headers["allow"] == "POST"
    assert (await server.http.put("/v1/responses/x")).headers["allow"] == "DELETE, GET"
    check_error(await server.http.get("/v1/models/a/b"), 404, "model")


async def test_large_bodies(make_server: MakeServer) -> None:
    server = make_server(max_body_bytes=1024)

    async def pieces() -> Any:
        for _ in range(10):
            yield b" " * 1000

    check_error(await server.http.post(COMPLETIONS, content=b" " * 1025), 413, None)
    check_error(await server.http.post(COMPLETIONS, content=pieces()), 413, None)


async def test_bodies_of_very_many_values(server: Server) -> None:
    many = b'{"prompt": "a", "metadata": {"a": [%s1]}}' % (b"[]," * 1_000_001)
    error = check_error(await server.http.post(COMPLETIONS, content=many), 413, None)
    assert "2000000" in error["message"]
    long = b'{"prompt": "a", "max_tokens": 1, "user": "%s"}' % (b"a" * 10_000_000)
    assert (await server.http.post(COMPLETIONS, content=long)).status_code == 200


async def test_bodies_are_bounded_together(make_server: MakeServer) -> None:
    server, size, go_on = make_server(max_body_bytes=100_000), 100_000, asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b" " * (size - 1)
        await go_on.wait()

    uploads = [
        asyncio.create_task(server.http.post(COMPLETIONS, content=slow())) for _ in range(16)
    ]
    response = await server.http.post(COMPLETIONS, content=b" " * size)
    while response.status_code != 429:
        check_error(response, 400, None)
        await asyncio.sleep(0)  # lets the others send
        response = await server.http.post(COMPLETIONS, content=b" " * size)
    assert check_error(response, 429, None)["code"] == "max_received_bytes"
    assert response.headers["retry-after"] == "1"
    await server.ok(COMPLETIONS, prompt="a")
    go_on.set()
    for response in await asyncio.gather(*uploads):
        check_error(response, 400, None)
    check_error(await server.http.post(COMPLETIONS, content=b" " * size), 400, None)


async def test_explicit_nulls_are_absent(server: Server) -> None:
    names = ("max_tokens", "n", "temperature", "stop", "stream", "stream_options", "logprobs",
             "seed", "logit_bias", "suffix", "best_of", "echo", "user", "guided_json")  # fmt: skip
    await server.ok(COMPLETIONS, prompt="a", **dict.fromkeys(names))
    await server.events(COMPLETIONS, prompt="a", stream_options={"include_usage": None})


async def test_nul_characters_reach_the_model(server: Server) -> None:
    await server.ok(COMPLETIONS, prompt="a\0b")
    assert server.service.tokenizer.backend.decode(server.engine.requests[0].prompt) == "a\0b"


async def test_unexpected_errors_have_the_same_shape(server: Server) -> None:
    def fail(request: object) -> None:
        raise ZeroDivisionError

    server.engine.submit = fail  # type: ignore[assignment, method-assign]
    response = await server.post(COMPLETIONS, prompt="a")
    error = check_error(response, 500, None)
    assert response.headers["x-request-id"] in error["message"]
