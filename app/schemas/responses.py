"""The request of `POST /v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.schemas.common import Natural, SamplingFields


class ResponsesStreamOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    include_obfuscation: bool | None = None  # inert: nothing is ever padded


class TextConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    format: dict[str, Any] | None = None  # checked by `app.responses.request`
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None  # inert: all of it is given


class FunctionTool(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


Includable = Literal[
    "message.output_text.logprobs",
    # What follows is never there to be included, or always is.
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsesRequest(SamplingFields, frozen=True, kw_only=True):
    input: str | list[Any]  # items: checked by `app.responses.items`
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    stream_options: ResponsesStreamOptions | None = None
    max_output_tokens: Natural | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[Includable] | None = None
    truncation: Literal["disabled"] | None = None
    background: bool | None = None
    metadata: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # Accepted without effect
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    max_tool_calls: Natural | None = None


INERT = {
    "user": "nothing is stored or billed per user",
    "service_tier": "there is one tier",
    "safety_identifier": "nothing is stored",
    "prompt_cache_key": "prefix caching is automatic",
    "prompt_cache_retention": "prefix caching is automatic",
    "prompt_cache_options": "prefix caching is automatic",
    "max_tool_calls": "there are no built-in tools",
}

REFUSED = {
    "conversation": "conversations are not kept; use previous_response_id",
    "prompt": "there are no prompt templates; send input",
    "background_options": "responses are not generated in the background",
    "context_management": "not supported",
    "moderation": "not supported",
    "image": "only text is supported",
    "access_programs": "not supported",
    "n": "one response has one choice",
    "max_tokens": "not a field of this endpoint; use max_output_tokens",
    "messages": "not a field of this endpoint; use input",
    "response_format": "not a field of this endpoint; use text.format",
}
