"""The request of `POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from app.schemas.common import INERT_COMMON, REFUSED_COMMON, GenerationFields, Natural


class ChatRequest(GenerationFields, frozen=True, kw_only=True):
    messages: Annotated[list[Any], Meta(min_length=1)]  # checked by `app.inputs.messages`
    max_completion_tokens: Natural | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # Accepted without effect
    prediction: dict[str, Any] | None = None


INERT = INERT_COMMON | {
    "prediction": "a hint that could only change speed",
}

REFUSED = REFUSED_COMMON | {
    "audio": "audio is not supported",
    "functions": "deprecated by OpenAI and not supported; use tools",
    "function_call": "deprecated by OpenAI and not supported; use tool_choice",
    "web_search_options": "web search is not supported",
    "moderation": "not supported",
    "echo": "not supported; use /v1/completions",
    "chat_template": "templates of requests are not run; the model's own is used",
    "mm_processor_kwargs": "only text is supported",
    "best_of": "not supported; use /v1/completions",
}
