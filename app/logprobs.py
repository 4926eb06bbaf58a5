"""Log-probabilities in the two shapes of the API."""

from __future__ import annotations

import msgspec

from app.tokenizer import Tokenizer
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


def chat_logprobs(entries: list[Entry], tokenizer: Tokenizer, count: int) -> ChatLogprobs:
    """The `logprobs` object of a chat choice; `count` is the request's `top_logprobs`.

    The sampled token is among the listed ones, unless none are wanted.
    """

    def top(token: int, logprob: float) -> ChatTop:
        data = tokenizer.token_bytes(token)
        return ChatTop(data.decode(errors="replace"), max(logprob, _LOWEST), list(data))

    def position(logprobs: TokenLogprobs) -> ChatToken:
        own = top(logprobs.token, logprobs.logprob)
        listed = [top(*pair) for pair in _with_sampled(logprobs)] if count else []
        return ChatToken(own.token, own.logprob, own.bytes, listed)

    return ChatLogprobs([position(e.logprobs) for e in entries if e.logprobs is not None])


def completion_logprobs(entries: list[Entry], tokenizer: Tokenizer) -> CompletionLogprobs:
    """The `logprobs` object of a completion choice. The sampled token is always listed."""
    result = CompletionLogprobs([], [], [], [])
    for entry in entries:
        result.tokens.append(tokenizer.token_text(entry.token))
        result.text_offset.append(entry.offset)
        if entry.logprobs is None:
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
            continue
        result.token_logprobs.append(max(entry.logprobs.logprob, _LOWEST))
        listed: dict[str, float] = {}
        for token, logprob in _with_sampled(entry.logprobs):
            # Several tokens may share a text (pieces of characters): the likeliest keeps it.
            listed.setdefault(tokenizer.token_text(token), max(logprob, _LOWEST))
        result.top_logprobs.append(listed)
    return result


def _with_sampled(logprobs: TokenLogprobs) -> list[tuple[int, float]]:
    listed = list(logprobs.top)
    if all(token != logprobs.token for token, _ in listed):
        listed.append((logprobs.token, logprobs.logprob))
    return listed
