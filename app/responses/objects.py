"""The response object and the items of its output."""

from __future__ import annotations

from typing import Any

import msgspec

from app.outputs.logprobs import ChatToken
from app.outputs.usage import Usage
from app.schemas.responses import FunctionTool, ReasoningConfig


class OutputText(msgspec.Struct):
    text: str = ""
    type: str = "output_text"
    annotations: list[str] = []
    logprobs: list[ChatToken] = []


class OutputMessage(msgspec.Struct, tag_field="type", tag="message"):
    id: str
    content: list[OutputText] = []
    status: str = "in_progress"
    role: str = "assistant"


class ReasoningText(msgspec.Struct):
    text: str = ""
    type: str = "reasoning_text"


class ReasoningItem(msgspec.Struct, tag_field="type", tag="reasoning"):
    id: str
    content: list[ReasoningText] = []
    status: str = "in_progress"
    summary: list[str] = []


class FunctionCall(msgspec.Struct, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: str = "in_progress"


OutputItem = OutputMessage | ReasoningItem | FunctionCall


class InputTokensDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage, reasoning_tokens: int) -> ResponseUsage:
        return cls(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(reasoning_tokens),
            usage.total_tokens,
        )


class IncompleteDetails(msgspec.Struct):
    reason: str


class ResponseError(msgspec.Struct):
    code: str
    message: str


class TextSettings(msgspec.Struct):
    format: dict[str, Any]
    verbosity: str = "medium"


class ResponseObject(msgspec.Struct, kw_only=True):
    """What a client gets, now and when it asks again."""

    id: str
    created_at: int
    model: str
    object: str = "response"
    status: str = "in_progress"
    background: bool = False
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningConfig
    store: bool
    temperature: float
    text: TextSettings
    tool_choice: str | dict[str, Any]
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
