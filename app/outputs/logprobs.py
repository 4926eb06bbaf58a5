"""Log-probabilities in the two shapes of the API."""

from __future__ import annotations

from collections.abc import Container, Sequence

import msgspec

from app.inputs.tokenizer import Tokenizer
from batching.core.types import TokenLogprobs

_LOWEST = -9999.0  # JSON has no -inf


class Entry(msgspec.Struct, frozen=True):
    """One position: where its text begins in the choice's text, and its logprobs.

    `logprobs` is None for the first token of an echoed prompt, which nothing predicts.
    """

    offset: int
    token: int
    logprobs: TokenLogprobs | None


class ChatTop(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(ChatTop):
    top_logprobs: list[ChatTop]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatToken]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class PromptLogprob(msgspec.Struct):
    """As vLLM has it, keyed by token id."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


def chat_logprobs(
    entries: Sequence[Entry],
    tokenizer: Tokenizer,
    count: int,
    *,
    hidden: Container[int] = (),
    as_ids: bool = False,
) -> ChatLogprobs:
    """The `logprobs` object of a chat choice; `count` is the request's `top_logprobs`.

    The sampled token is among the listed ones, unless none are wanted. `hidden` tokens have a name
    but no bytes, since they are not in the text. `as_ids`: tokens are named by their ids.
    """

    def top(token: int, logprob: float) -> ChatTop:
        data = tokenizer.token_bytes(token)
        name = _id_name(token) if as_ids else data.decode(errors="replace")
        return ChatTop(name, max(logprob, _LOWEST), [] if token in hidden else list(data))

    def position(logprobs: TokenLogprobs) -> ChatToken:
        own = top(logprobs.token, logprobs.logprob)
        listed = [top(*pair) for pair in _with_sampled(logprobs)] if count else []
        return ChatToken(own.token, own.logprob, own.bytes, listed)

    return ChatLogprobs([position(e.logprobs) for e in entries if e.logprobs is not None])


def completion_logprobs(
    entries: Sequence[Entry], tokenizer: Tokenizer, *, as_ids: bool = False
) -> CompletionLogprobs:
    """The `logprobs` object of a completion choice. The sampled token is always listed.

    `as_ids`: tokens are named by their ids.
    """
    name = _id_name if as_ids else tokenizer.token_text
    result = CompletionLogprobs([], [], [], [])
    for entry in entries:
        result.tokens.append(name(entry.token))
        result.text_offset.append(entry.offset)
        if entry.logprobs is None:
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
            continue
        result.token_logprobs.append(max(entry.logprobs.logprob, _LOWEST))
        listed: dict[str, float] = {}
        for token, logprob in _with_sampled(entry.logprobs):
            # Several tokens may share a text (pieces of characters): the likeliest keeps it.
            listed.setdefault(name(token), max(logprob, _LOWEST))
        result.top_logprobs.append(listed)
    return result


def prompt_logprobs(found: list[TokenLogprobs], tokenizer: Tokenizer, count: int) -> PromptLogprobs:
    """Of each prompt token itself and the `count` likeliest; nothing predicts the first."""

    def position(logprobs: TokenLogprobs) -> dict[str, PromptLogprob]:
        ranked = [(rank, *pair) for rank, pair in enumerate(logprobs.top[:count], 1)]
        own = (logprobs.rank, logprobs.token, logprobs.logprob)
        return {
            str(token): PromptLogprob(max(logprob, _LOWEST), rank, tokenizer.token_text(token))
            for rank, token, logprob in (own, *ranked)
        }

    return [None, *map(position, found)]


def _id_name(token: int) -> str:
    return f"token_id:{token}"


def _with_sampled(logprobs: TokenLogprobs) -> list[tuple[int, float]]:
    listed = list(logprobs.top)
    if all(token != logprobs.token for token, _ in listed):
        listed.append((logprobs.token, logprobs.logprob))
    return listed
