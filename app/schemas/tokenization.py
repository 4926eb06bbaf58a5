"""The requests of `POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Either `prompt` or `messages`. What follows `messages` belongs to it."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None  # default: for a prompt true, for messages false
    return_token_strs: bool = False

    messages: Annotated[list[Any], Meta(min_length=1)] | None = None  # by `app.inputs.messages`
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    model: str | None = None
    tokens: list[int]


REFUSED_BY_TOKENIZE = {
    "chat_template": "templates of requests are not run; the model's own is used",
    "media_io_kwargs": "only text is supported",
    "mm_processor_kwargs": "only text is supported",
}
