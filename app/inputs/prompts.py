"""The four forms of a completion's prompt, and what any prompt must satisfy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from app.http.errors import ApiError
from app.inputs.tokenizer import PromptTooLongError
from app.schemas.chat import ChatRequest
from app.schemas.completions import CompletionRequest

if TYPE_CHECKING:
    from app.service import Service

Prompt = str | list[int]


def split_prompts(prompt: str | list[Any], param: str = "prompt") -> list[Prompt]:
    """A string, strings, token ids or lists of token ids, as a list of prompts.

    Raises `ApiError` naming `param` for an empty or mixed list and for ids that are not integers.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise _bad(param, "the list is empty")
    if all(type(item) is int for item in prompt):  # not isinstance: True is no token
        return [prompt]
    if all(type(item) is str for item in prompt):
        return list(prompt)
    if not all(type(item) is list for item in prompt):
        raise _bad(param, "expected a string, strings, token ids, or lists of token ids")
    for i, ids in enumerate(prompt):
        if not ids:
            raise _bad(f"{param}[{i}]", "the list is empty")
        if not all(type(item) is int for item in ids):
            raise _bad(f"{param}[{i}]", "expected token ids")
    return list(prompt)


def tokenize(
    prompt: Prompt,
    service: Service,
    fields: ChatRequest | CompletionRequest,
    *,
    max_tokens: int | None,
    param: str,
) -> list[int]:
    """Token ids of a prompt; ids are used exactly as given.

    One that is longer than the fields say is cut. Raises `ApiError` naming `param`.
    """
    limit = service.prompt_limit
    keep = _kept_tokens(fields.truncate_prompt_tokens, max_tokens, service.context)
    if isinstance(prompt, str):
        bound = limit if keep is None else len(prompt)
        try:
            ids = service.tokenizer.encode(
                prompt, add_special_tokens=fields.add_special_tokens, limit=bound
            )
        except PromptTooLongError:
            raise too_long(param, limit) from None
    else:
        ids = prompt
        if len(ids) <= limit or keep is not None:
            check_token_ids(ids, service.capabilities.vocab_size, param)
    if keep is not None:
        ids = ids[-keep:] if fields.truncation_side == "left" else ids[:keep]
    if not ids:
        raise _bad(param, "the prompt has no tokens")
    if len(ids) > limit:
        raise too_long(param, limit, len(ids))
    return ids


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises `ApiError` for one that the model does not have."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise _bad(param, f"token ids must be at least 0 and less than {vocab_size}")


def _kept_tokens(truncate: int | None, max_tokens: int | None, context: int) -> int | None:
    """How many tokens of a prompt to use, None: all. -1 asks for what fits the context.

    Raises `ApiError` for a request to keep nothing.
    """
    if truncate == 0:
        raise _bad("truncate_prompt_tokens", "must be at least 1, or -1 for what fits")
    if truncate == -1:
        return max(context - max(max_tokens or 1, 1), 1)
    return truncate


def too_long(param: str, limit: int, length: int | None = None) -> ApiError:
    """A prompt that leaves no room for one more token in the model's context."""
    has = f"has {length} tokens" if length is not None else "is too long"
    return ApiError(
        f"the prompt {has}; this model takes at most {limit} prompt tokens "
        f"(its context is {limit + 1} tokens, prompt and output together)",
        param=param,
        code="context_length_exceeded",
    )


def _bad(param: str, message: str) -> ApiError:
    return ApiError(f"{param}: {message}", param=param, code="invalid_value")
