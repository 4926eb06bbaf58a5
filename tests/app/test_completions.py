"""`/v1/completions`: prompts, choices, usage, echo, logprobs, stops, streams."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from batching.core.types import Request
from tests.app.conftest import MakeServer, Server

PATH = "/v1/completions"


async def test_defaults_and_shape(server: Server) -> None:
    server.say("hello world", end=False)
    server.engine.script = lambda request: server.ids("hello world") * 20
    answer = await server.ok(PATH, prompt="hello", model="tiny")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 16
    (request,) = server.engine.requests
    assert request.params.top_k == 7  # generation_config.json
    assert request.params.temperature == 1.0
    assert request.params.stop_token_ids == (0,)


async def test_four_forms_of_a_prompt(server: Server) -> None:
    hello, world = server.ids("hello"), server.ids(" world")
    for prompt, expected in (
        ("hello", [hello]),
        (["hello", " world"], [hello, world]),
        (hello, [hello]),
        ([hello, world], [hello, world]),
    ):
        server.engine.requests.clear()
        answer = await server.ok(PATH, prompt=prompt, max_tokens=2)
        assert [r.prompt for r in server.engine.requests] == expected
        assert [c["index"] for c in answer["choices"]] == list(range(len(expected)))


async def test_choice_index_is_prompt_times_n_plus_sample(server: Server) -> None:
    server.engine.script = lambda request: [*request.prompt, request.params.seed % 5 + 5, 0]
    answer = await server.ok(PATH, prompt=[[70], [71]], n=2, seed=10)
    decode = server.service.tokenizer.backend.decode
    expected = [decode([p, s % 5 + 5]) for p in (70, 71) for s in (10, 11)]
    assert [c["text"] for c in answer["choices"]] == expected
    assert answer["usage"]["prompt_tokens"] == 2  # each prompt once
    assert answer["usage"]["completion_tokens"] == 12


async def test_seeds_repeat_and_differ(server: Server) -> None:
    async def texts(**fields: Any) -> list[str]:
        answer = await server.ok(PATH, prompt="a", max_tokens=12, **fields)
        return [c["text"] for c in answer["choices"]]

    assert await texts(n=3, seed=-4) == await texts(n=3, seed=-4)
    assert len(set(await texts(n=3, seed=-4))) == 3
    assert await texts() != await texts()
    assert len(set(await texts(n=2, temperature=0))) == 1


async def test_best_of_returns_the_likeliest(server: Server) -> None:
    from batching.core import types
    from tests.app import fake_engine

    original = fake_engine.fake_logprobs

    def by_token(token: int, count: int, vocab_size: int) -> types.TokenLogprobs:
        return types.TokenLogprobs(token, -float(token), 1, ())

    fake_engine.fake_logprobs = by_token
    try:
        server.engine.script = lambda request: [60 + (request.params.seed * 3) % 7, 0]
        answer = await server.ok(PATH, prompt=[[70], [71]], n=2, best_of=5, seed=0)
    finally:
        fake_engine.fake_logprobs = original
    decode = server.service.tokenizer.backend.decode
    assert [c["text"] for c in answer["choices"]] == [decode([60]), decode([62])] * 2
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert [c["logprobs"] for c in answer["choices"]] == [None] * 4
    assert answer["usage"]["completion_tokens"] == 20


async def test_stream_equals_plain(server: Server) -> None:
    fields = {"prompt": ["hello", "日本"], "n": 2, "seed": 3, "max_tokens": 40, "logprobs": 2}
    plain = await server.ok(PATH, **fields)
    chunks = await server.events(PATH, **fields)
    assert {c["id"] for c in chunks} == {chunks[0]["id"]}
    assert {c["created"] for c in chunks} == {chunks[0]["created"]}
    assert all("usage" not in c for c in chunks)
    for expected in plain["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(c["text"] for c in mine) == expected["text"]
        finishes = [c["finish_reason"] for c in mine]
        assert finishes[-1] == expected["finish_reason"]
        assert finishes[:-1] == [None] * (len(mine) - 1)
        for key, value in expected["logprobs"].items():
            assert [x for c in mine for x in c["logprobs"][key]] == value


async def test_stream_usage(server: Server) -> None:
    server.say("hello world")
    fields = {"prompt": "hello"}
    chunks = await server.events(PATH, **fields, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert all(c["usage"] is None for c in chunks[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await server.events(PATH, **fields, stream_options=options)
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 3]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt_is_text", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_echo(server: Server, stream: bool, prompt_is_text: bool, max_tokens: int) -> None:
    server.say(" world, this")
    text = "hello 日本"
    prompt = text if prompt_is_text else server.ids(text)
    fields = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    if stream:
        chunks = [c["choices"][0] for c in await server.events(PATH, **fields)]
    else:
        chunks = (await server.ok(PATH, **fields))["choices"]
    full = text + (" world," if max_tokens else "")
    assert "".join(c["text"] for c in chunks) == full
    assert chunks[-1]["finish_reason"] == "length"
    logprobs = {k: [x for c in chunks for x in c["logprobs"][k]] for k in chunks[0]["logprobs"]}
    ids = server.ids(text) + server.ids(" world,")[:max_tokens]
    assert len(logprobs["tokens"]) == len(ids)
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value == -1.25 for value in logprobs["token_logprobs"][1:])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if "\ufffd" not in token:
            assert full[offset:].startswith(token)


async def test_max_tokens_0_counts_no_output(server: Server) -> None:
    answer = await server.ok(PATH, prompt="hello", echo=True, max_tokens=0)
    assert answer["choices"][0]["text"] == "hello"
    assert answer["usage"]["completion_tokens"] == 0


async def test_logprobs_0_still_returns_the_sampled_token(server: Server) -> None:
    server.say("hello world")
    (choice,) = (await server.ok(PATH, prompt="a", logprobs=0))["choices"]
    assert choice["logprobs"] == {
        "tokens": ["hello", " world"],
        "token_logprobs": [-1.25, -1.25],
        "top_logprobs": [{"hello": -1.25}, {" world": -1.25}],
        "text_offset": [0, 5],
    }


async def test_sampled_token_is_among_the_top_and_no_infinity(server: Server) -> None:
    server.say("hello world")
    (choice,) = (await server.ok(PATH, prompt="a", logprobs=3))["choices"]
    for token, top in zip(
        choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"], strict=True
    ):
        assert top[token] == -1.25
        assert min(top.values()) == -9999.0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("wor", "hello ", "wor"),
        (["o w"], "hell", "o w"),
        (["zzz", "this", "llo world, th"], "he", "llo world, th"),
        (["world, this is not"], "hello world, this", None),
        ("never", "hello world, this", None),
        (["is"], "hello world, th", "is"),
    ],
)
async def test_stop_strings(
    server: Server, stream: bool, stop: Any, text: str, reason: str | None
) -> None:
    server.say("hello world, this")
    if stream:
        choices = [c["choices"][0] for c in await server.events(PATH, prompt="this", stop=stop)]
    else:
        choices = (await server.ok(PATH, prompt="this", stop=stop))["choices"]
    assert "".join(c["text"] for c in choices) == text
    assert choices[-1]["finish_reason"] == "stop"
    assert choices[-1]["stop_reason"] == reason


@pytest.mark.parametrize("stream", [False, True])
async def test_each_choice_is_cut_at_its_own_first_stop(server: Server, stream: bool) -> None:
    texts = ["hello world, this", "this small world", "hello hello"]
    server.engine.script = lambda request: [*server.ids(texts[request.params.seed]), 0]
    fields = {"prompt": "this world", "n": 3, "seed": 0, "stop": ["wor", "small", ", t"]}
    if stream:
        chunks = await server.events(PATH, **fields)
        mine = [
            [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i] for i in range(3)
        ]
        found = [("".join(c["text"] for c in each), each[-1]["stop_reason"]) for each in mine]
    else:
        choices = (await server.ok(PATH, **fields))["choices"]
        found = [(choice["text"], choice["stop_reason"]) for choice in choices]
    assert found == [("hello ", "wor"), ("this ", "small"), ("hello hello", None)]


async def test_stop_string_in_output_when_asked(server: Server) -> None:
    server.say("hello world, this")
    answer = await server.ok(PATH, prompt="a", stop=["wor"], include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == "hello wor"


async def test_a_stop_string_ends_the_request_in_the_engine(server: Server) -> None:
    server.engine.script = lambda request: server.ids("hello world") * 100
    answer = await server.ok(PATH, prompt="a", stop="world", max_tokens=200, n=2)
    assert answer["usage"]["completion_tokens"] == 4  # up to the token that completes the match
    assert len(server.engine.aborted) == 2


async def test_stop_token_of_the_user(server: Server) -> None:
    server.say("hello world, this")
    (comma,) = server.ids(",")
    (choice,) = (await server.ok(PATH, prompt="a", stop_token_ids=[comma]))["choices"]
    assert choice["text"] == "hello world"
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == comma


async def test_ignore_eos(server: Server) -> None:
    server.engine.script = lambda request: [*server.ids("hello"), 0, *server.ids(" world")]
    fields = {"prompt": "a", "ignore_eos": True}
    assert (await server.ok(PATH, **fields))["choices"][0]["text"] == "hello world"
    shown = await server.ok(PATH, **fields, skip_special_tokens=False)
    assert shown["choices"][0]["text"] == "hello<|end|> world"
    assert server.engine.requests[0].params.stop_token_ids == ()


async def test_fields_reach_the_engine(server: Server) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 42,
        "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.1,
        "min_tokens": 2, "max_tokens": 5,
    }  # fmt: skip
    await server.ok(PATH, prompt="a", **fields, logit_bias={"7": 100, "3": -100},
                    stop_token_ids=[9], priority=3, cache_salt="mine")  # fmt: skip
    (request,) = server.engine.requests
    assert {name: getattr(request.params, name) for name in fields} == fields
    assert request.params.logit_bias == ((3, -100.0), (7, 100.0))
    assert request.params.stop_token_ids == (0, 9)
    assert (request.priority, request.salt) == (3, b"mine")


async def test_merged_events_give_the_same_answer(server: Server) -> None:
    async def answers() -> list[dict[str, Any]]:
        found = []
        for extra in ({}, {"logprobs": 1}, {"stop": ["o w", "é"]}, {"echo": True}):
            answer = await server.ok(PATH, prompt="hello", seed=5, max_tokens=60, **extra)
            found.append((answer["choices"], answer["usage"]))
        return found

    one_by_one = await answers()
    server.engine.tokens_per_step = 7
    assert await answers() == one_by_one


async def test_text_of_split_characters_is_never_broken(server: Server) -> None:
    tokens = server.ids("日本語 😀 naïve") * 5
    server.engine.script = lambda request: tokens
    plain = await server.ok(PATH, prompt="a", max_tokens=50)
    text = plain["choices"][0]["text"]
    assert "\ufffd" not in text
    assert ("日本語 😀 naïve" * 5).startswith(text)
    chunks = await server.events(PATH, prompt="a", max_tokens=50)
    assert "".join(c["choices"][0]["text"] for c in chunks) == text


async def test_requests_of_one_call_have_distinct_ids(server: Server) -> None:
    headers = {"x-request-id": "same"}
    for _ in range(2):
        response = await server.http.post(PATH, json={"prompt": "a", "n": 2}, headers=headers)
        assert response.headers["x-request-id"] == "same"
    assert len({r.id for r in server.engine.requests}) == 4


async def test_much_work_is_done_off_the_event_loop(server: Server) -> None:
    threads = []
    encode = server.service.tokenizer.encode

    def spy(*args: Any, **fields: Any) -> list[int]:
        threads.append(threading.current_thread())
        return encode(*args, **fields)

    server.service.tokenizer.encode = spy  # type: ignore[method-assign]
    long = await server.post(PATH, prompt="hello world " * 2000, max_tokens=1)
    assert long.json()["error"]["param"] == "prompt"
    await server.ok(PATH, prompt="hello world", max_tokens=1)
    await server.ok("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
    main = threading.main_thread()
    assert [t is main for t in threads] == [False] + [True] * 2


async def test_more_sequences_than_the_queue_may_hold_are_refused_before_any_work(
    make_server: MakeServer,
) -> None:
    server = make_server(max_queued_requests=8)
    server.service.tokenizer.encode = None  # type: ignore[method-assign,assignment]
    for fields in ({"prompt": ["a"] * 9}, {"prompt": ["a"] * 3, "n": 3}, {"prompt": "a", "n": 9}):
        response = await server.post(PATH, **fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "n"


async def test_inert_fields_are_accepted(server: Server) -> None:
    await server.ok(PATH, prompt="a", user="me", metadata={"a": "b"}, store=True)
    assert isinstance(server.engine.requests[0], Request)


async def test_engine_error_in_the_middle_of_a_stream(server: Server) -> None:
    server.say("hello world, this")
    server.engine.die_after = 2
    response = await server.post(PATH, prompt="a", stream=True, max_tokens=9)
    assert response.status_code == 200
    events = [e.removeprefix("data: ") for e in response.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    assert '"code":"engine_unavailable"' in events[-3]
    assert server.service.metrics.finished["error"] == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_the_engine_fails_on_is_named(server: Server, stream: bool) -> None:
    server.say("hello world")
    server.engine.free_tokens = 1
    server.engine.resume.clear()
    call = asyncio.create_task(
        server.http.post(
            PATH,
            json={"prompt": "a", "stream": stream, "max_tokens": 9},
            headers={"x-request-id": "my-request"},
        )
    )
    while not server.service.metrics.generation_tokens:
        await asyncio.sleep(0)
    server.engine.error = "the request crashed the engine repeatedly"
    server.engine.resume.set()
    response = await call
    assert response.status_code == (200 if stream else 500)
    assert stream or response.headers["x-should-retry"] == "false"
    *_, body = (e for e in response.text.split("\n\n") if "error" in e)
    error = json.loads(body.removeprefix("data: "))["error"]
    assert error["type"] == "server_error" and error["code"] == "engine_error"
    assert "crashed" in error["message"] and "my-request" in error["message"]


async def test_engine_gone_before_and_during_a_plain_request(server: Server) -> None:
    server.engine.die_after = 2
    assert (await server.post(PATH, prompt="a", max_tokens=9)).status_code == 503
    response = await server.post(PATH, prompt="a")
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert (await server.http.get("/health")).status_code == 503
