"""The request of `POST /v1/completions`."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from app.schemas.common import INERT_COMMON, REFUSED_COMMON, GenerationFields


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    prompt: str | list[Any]  # text, texts, ids or lists of ids: `app.inputs.prompts` tells which
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_special_tokens: bool = True


INERT = INERT_COMMON

REFUSED = REFUSED_COMMON | {
    "suffix": "filling in the middle is not supported",
    "prompt_embeds": "not supported; send text or token ids",
}
