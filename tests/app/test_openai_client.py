"""OpenAI's own client and types parse everything."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest

from tests.app.conftest import MakeServer, Server

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(make_server: MakeServer) -> AsyncIterator[tuple[openai.AsyncOpenAI, Server]]:
    server = make_server(api_keys=("key",))
    async with openai.AsyncOpenAI(
        api_key="key", base_url="http://test/v1", http_client=server.http, max_retries=0,
        _strict_response_validation=True,
    ) as client:  # fmt: skip
        yield client, server


def lenient(api: openai.AsyncOpenAI) -> openai.AsyncOpenAI:
    """For completion streams: the type forbids the null `finish_reason` that OpenAI sends too."""
    return openai.AsyncOpenAI(
        api_key="key", base_url=api.base_url, http_client=api._client, max_retries=0
    )


async def test_completions(client: tuple[openai.AsyncOpenAI, Server]) -> None:
    api, server = client
    server.say("hello world, this")
    fields = {"model": "tiny", "prompt": "hello", "logprobs": 2}
    plain = await api.completions.create(**fields)
    assert plain.choices[0].text == "hello world, this"
    assert plain.choices[0].logprobs is not None
    assert plain.usage is not None
    text, usage = "", None
    async for chunk in await lenient(api).completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    ):
        text += "".join(choice.text for choice in chunk.choices)
        usage = chunk.usage
    assert text == plain.choices[0].text
    assert usage == plain.usage


async def test_chat(client: tuple[openai.AsyncOpenAI, Server]) -> None:
    api, server = client
    server.say("hello world, this")
    fields = {"model": "tiny", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "n": 2}
    plain = await api.chat.completions.create(**fields)
    assert [c.message.content for c in plain.choices] == ["hello world, this"] * 2
    texts = ["", ""]
    async with api.chat.completions.stream(**fields) as stream:
        async for event in stream:
            if event.type == "chunk":
                for choice in event.chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
        final = await stream.get_final_completion()
    assert texts == ["hello world, this"] * 2
    assert [c.message.content for c in final.choices] == texts
    assert [c.logprobs for c in final.choices] == [c.logprobs for c in plain.choices]


async def test_models(client: tuple[openai.AsyncOpenAI, Server]) -> None:
    api, _ = client
    assert [model.id async for model in api.models.list()] == ["tiny"]
    assert (await api.models.retrieve("tiny")).id == "tiny"


async def test_errors(client: tuple[openai.AsyncOpenAI, Server]) -> None:
    api, server = client
    with pytest.raises(openai.BadRequestError) as bad:
        await api.completions.create(model="tiny", prompt="a", temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        await api.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await api.with_options(api_key="wrong").models.list()
    server.say("hello world, this")
    server.engine.die_after = 2
    stream = await lenient(api).completions.create(model="tiny", prompt="a", stream=True)
    with pytest.raises(openai.APIError, match="engine"):
        async for _ in stream:
            pass


async def test_responses(client: tuple[openai.AsyncOpenAI, Server]) -> None:
    api, server = client
    server.say("hello world, this")
    fields = {
        "model": "tiny", "input": "hi", "include": ["message.output_text.logprobs"],
        "top_logprobs": 2, "metadata": {"a": "b"}, "instructions": "be brief",
    }  # fmt: skip
    plain = await api.responses.create(**fields)
    assert plain.output_text == "hello world, this"
    assert plain.usage is not None and plain.usage.output_tokens_details.reasoning_tokens == 0
    text, kinds = "", []
    async with api.responses.stream(**fields) as stream:
        async for event in stream:
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
        final = await stream.get_final_response()
    assert text == final.output_text == plain.output_text
    assert final.usage == plain.usage
    assert kinds[-1] == "response.completed"
    following = await api.responses.create(
        model="tiny", input="more", previous_response_id=final.id
    )
    assert await api.responses.retrieve(following.id) == following
    items = [item async for item in api.responses.input_items.list(following.id, limit=1)]
    assert [item.type for item in items] == ["message"] * 3
    assert (await api.responses.input_tokens.count(input="hi", model="tiny")).input_tokens
    await api.responses.delete(following.id)
    with pytest.raises(openai.NotFoundError):
        await api.responses.retrieve(following.id)


async def test_a_failing_response(client: tuple[openai.AsyncOpenAI, Server]) -> None:
    api, server = client
    with pytest.raises(openai.BadRequestError) as bad:
        await api.responses.create(model="tiny", input="a", previous_response_id="resp_x")
    assert bad.value.param == "previous_response_id"
    server.say("hello world, this")
    server.engine.die_after = 2
    events = [e async for e in await api.responses.create(model="tiny", input="a", stream=True)]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
