"""The requests of `POST /v1/messages` and `POST /v1/messages/count_tokens`: Anthropic's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.schemas.common import RequestId

Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Content = str | list[dict[str, Any]]  # blocks: checked by `app.anthropic.request`


class AnthropicMessage(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: Content


class AnthropicTool(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    name: str
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool | None = None  # inert: arguments are streamed as they come


class AnthropicToolChoice(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`budget_tokens` and `display` are inert: a model thinks as long as it does, in the open."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    display: str | None = None


class JsonOutput(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonOutput | None = None


class CountTokensRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What makes up the prompt."""

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], Meta(min_length=1)]
    system: Content | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None  # what is cached is not for requests to say

    # Accepted without effect
    speed: Literal["standard", "fast"] | None = None


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    max_tokens: Positive
    stream: bool = False
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop_sequences: list[str] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    cache_salt: Annotated[str, Meta(min_length=1)] | None = None
    request_id: RequestId | None = None

    # Accepted without effect
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    inference_geo: str | None = None


INERT = {
    "speed": "there is one speed",
    "metadata": "nothing is stored",
    "service_tier": "there is one tier",
    "inference_geo": "there is one place",
}

REFUSED = {
    "container": "there are no server tools",
    "mcp_servers": "there are no server tools",
    "context_management": "not supported",
    "diagnostics": "not supported",
    "output_format": "use output_config.format",
}
