"""A request gives the same tokens alone, in a crowd, after a prefix hit; seeded or greedy."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import MODEL
from tests.e2e.server_process import ServerProcess

STORY = "Once upon a time there was a fox who lived in a small house near the river. "


async def texts(client: openai.AsyncOpenAI, **fields: Any) -> list[str]:
    answer = await client.completions.create(
        model=MODEL, **{"prompt": STORY, "max_tokens": 30, **fields}
    )
    return [choice.text for choice in answer.choices]


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0}, {"temperature": 1.0, "seed": 7}, {"temperature": 1.5, "top_p": 0.9,
     "seed": 8, "frequency_penalty": 0.5}],
    ids=["greedy", "seeded", "seeded with penalties"],
)  # fmt: skip
async def test_alone_or_in_a_crowd(aclient: openai.AsyncOpenAI, sampling: dict[str, Any]) -> None:
    alone = await texts(aclient, **sampling)
    others = (texts(aclient, prompt=f"Story {i}: " * i, seed=i) for i in range(1, 16))
    mine = (texts(aclient, **sampling) for _ in range(3))
    assert (await asyncio.gather(*others, *mine))[-3:] == [alone] * 3


async def test_samples_of_one_seed_differ_and_repeat(aclient: openai.AsyncOpenAI) -> None:
    fields = {"n": 4, "seed": 3, "temperature": 1.0}
    first = await texts(aclient, **fields)
    assert len(set(first)) == 4
    assert await texts(aclient, **fields) == first
    assert await texts(aclient, **fields | {"seed": 4}) != first


async def test_greedy_ignores_the_seed_and_allows_several(aclient: openai.AsyncOpenAI) -> None:
    several = await texts(aclient, temperature=0, n=3, seed=1)
    assert several == 3 * await texts(aclient, temperature=0, seed=2)


async def test_a_prefix_hit_changes_neither_text_nor_logprobs(aclient: openai.AsyncOpenAI) -> None:
    for fields in ({"temperature": 0}, {"temperature": 1.0, "seed": 5}):
        options = {
            "model": MODEL, "prompt": STORY * 6, "max_tokens": 12, "logprobs": 2, **fields,
            "extra_body": {"cache_salt": f"fresh {fields}"},
        }  # fmt: skip
        first, second = [await aclient.completions.create(**options) for _ in range(2)]
        usages = [answer.usage for answer in (first, second)]
        cached = [u.prompt_tokens_details.cached_tokens for u in usages if u]  # type: ignore[union-attr]
        assert cached[0] == 0 < cached[1]
        assert first.choices == second.choices
        # Echoed logprobs cover the prompt although its KV is there already.
        echoed = (await aclient.completions.create(**options, echo=True)).choices[0]
        logprobs, own = echoed.logprobs, first.choices[0].logprobs
        assert echoed.text == STORY * 6 + first.choices[0].text
        assert logprobs is not None and own is not None
        assert usages[0] is not None
        assert len(logprobs.tokens or ()) == usages[0].total_tokens
        *prompt, _ = (logprobs.token_logprobs or [])[: usages[0].prompt_tokens]
        assert prompt[0] is None and None not in prompt[1:]
        assert (logprobs.token_logprobs or [])[-12:] == own.token_logprobs


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 2}])
def test_bad_words_are_not_said(server: ServerProcess, sampling: dict[str, Any]) -> None:
    def ids(text: str) -> list[int]:
        answer = httpx.post(f"{server.url}/tokenize", json={"prompt": text}, timeout=60)
        return answer.json()["tokens"]

    def spoken(bad_words: list[str]) -> tuple[str, list[int]]:
        body = {
            "prompt": STORY.strip(), "max_tokens": 40, "ignore_eos": True, "return_token_ids": True,
            "bad_words": bad_words, **sampling,
        }  # fmt: skip
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        choice = answer.json()["choices"][0]
        return choice["text"], choice["token_ids"]

    text, free = spoken([])
    words = text.split(" ")
    bad = [word for word in words if word] + [" ".join(pair) for pair in pairwise(words)]
    sequences = [ids(prefix + word) for word in bad for prefix in ("", " ")]
    said = [s for s in sequences if _contains(free, s)]
    assert any(len(s) > 2 for s in said) and any(len(s) == 1 for s in said)
    _, kept = spoken(bad[:256])
    assert len(kept) == 40
    assert not any(_contains(kept, sequence) for sequence in sequences)


def _contains(tokens: list[int], part: list[int]) -> bool:
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens)))


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 2.0, "seed": 2}])
def test_bias_forces_and_bans(server: ServerProcess, sampling: dict[str, Any]) -> None:
    def tokens(**fields: Any) -> list[str]:
        body = {
            "prompt": STORY, "max_tokens": 12, "logprobs": 0, "ignore_eos": True,
            "return_tokens_as_token_ids": True, **sampling, **fields,
        }  # fmt: skip
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        return answer.json()["choices"][0]["logprobs"]["tokens"]

    assert set(tokens(logit_bias={"300": 100})) == {"token_id:300"}
    free = tokens()
    banned = {name.removeprefix("token_id:"): -100 for name in free}
    assert not set(free) & set(tokens(logit_bias=banned))
    only = {"token_id:300", "token_id:301"}
    assert set(tokens(allowed_token_ids=[300, 301])) <= only
