"""What comes back is real text, and the same however it is asked for."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.e2e.conftest import MODEL
from tests.e2e.server_process import ServerProcess

PROMPTS = ["Once upon a time", "Once upon a time there was a fox", "What is 12 + 30?"]


def streamed_completion(client: openai.OpenAI, **fields: Any) -> tuple[str, str | None]:
    text, finish = "", None
    for chunk in client.completions.create(model=MODEL, stream=True, **fields):
        text += chunk.choices[0].text
        assert finish is None, "nothing comes after the finish reason"
        finish = chunk.choices[0].finish_reason
    return text, finish


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "seed": 11}])
def test_completion_streamed_equals_plain(
    client: openai.OpenAI, prompt: str, sampling: dict[str, Any]
) -> None:
    plain = client.completions.create(model=MODEL, prompt=prompt, max_tokens=40, **sampling)
    text, finish = streamed_completion(client, prompt=prompt, max_tokens=40, **sampling)
    assert text == plain.choices[0].text
    assert finish == plain.choices[0].finish_reason
    assert plain.usage is not None
    assert 0 < plain.usage.completion_tokens <= 40


def test_chat_streamed_equals_plain_and_ends_its_turn(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
        "max_tokens": 60,
    }
    plain = client.chat.completions.create(**fields)
    assert plain.choices[0].finish_reason == "stop"
    assert "Paris" in (plain.choices[0].message.content or "")
    chunks = list(
        client.chat.completions.create(
            **fields, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == plain.choices[0].message.content


def test_the_four_prompt_forms_agree(client: openai.OpenAI, server: ServerProcess) -> None:
    first = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=8, temperature=0)
    echoed = client.completions.create(
        model=MODEL, prompt="Once upon", max_tokens=1, temperature=0, echo=True, logprobs=0
    )
    assert echoed.choices[0].logprobs is not None
    tokens = echoed.choices[0].logprobs.tokens
    assert tokens is not None and "".join(tokens).startswith("Once upon")
    both = client.completions.create(
        model=MODEL, prompt=["Once upon", "Once"], max_tokens=8, temperature=0, n=2
    )
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == first.choices[0].text
    ids = client.completions.create(
        model=MODEL, prompt=[[100, 101, 102], [103]], max_tokens=4, temperature=0
    )
    single = client.completions.create(
        model=MODEL, prompt=[100, 101, 102], max_tokens=4, temperature=0
    )
    assert ids.choices[0].text == single.choices[0].text
    assert ids.usage is not None and ids.usage.prompt_tokens == 4


def test_stop_strings_cut_the_text_across_tokens(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(model=MODEL, **fields).choices[0].text
    stop = whole[9:14]
    cut = client.completions.create(model=MODEL, stop=[stop], **fields).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    assert streamed_completion(client, stop=[stop], **fields) == (cut.text, "stop")


def test_multibyte_text_is_never_broken(client: openai.OpenAI) -> None:
    """Random sampling from byte-level tokens yields split characters at every turn."""
    for seed in range(4):
        fields: dict[str, Any] = {
            "prompt": "São Paulo, Zürich, 東京, 🙂 and",
            "max_tokens": 60,
            "temperature": 2.0,
            "seed": seed,
            "extra_body": {"ignore_eos": True},
        }
        plain = client.completions.create(model=MODEL, **fields).choices[0].text
        text, _ = streamed_completion(client, **fields)
        assert text == plain


def test_echo_and_logprobs_agree_with_the_text(client: openai.OpenAI) -> None:
    choice = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=6, temperature=0, echo=True, logprobs=2
    ).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset is not None
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token


def test_models_health_and_version(client: openai.OpenAI, server: ServerProcess) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
