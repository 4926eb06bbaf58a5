"""A Responses request as the chat request that it comes to."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from app.http.body import convert
from app.http.errors import ApiError, renamed
from app.responses.items import Item, messages_of
from app.responses.objects import ResponseObject, TextSettings
from app.schemas.chat import ChatRequest
from app.schemas.common import SamplingFields
from app.schemas.responses import FunctionTool, ReasoningConfig, ResponsesRequest
from app.service import Service

# Where the chat request's fields come from, for errors about them.
_FIELDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}

_MAX_METADATA = 16
_LOGPROBS = "message.output_text.logprobs"


def check(fields: ResponsesRequest) -> None:
    """What the schema cannot say. Raises `ApiError`."""
    if fields.background:
        raise _bad("background", "responses are not generated in the background")
    if fields.max_output_tokens == 0:
        raise _bad("max_output_tokens", "must be at least 1")
    if fields.stream_options is not None and not fields.stream:
        raise _bad("stream_options", "only allowed when stream is true")
    metadata = fields.metadata or {}
    if len(metadata) > _MAX_METADATA:
        raise _bad("metadata", f"at most {_MAX_METADATA} entries, got {len(metadata)}")
    for key, value in metadata.items():
        if not isinstance(value, str) or len(key) > 64 or len(value) > 512:
            raise _bad("metadata", "expected keys of up to 64 and strings of up to 512 characters")


def chat_request(fields: ResponsesRequest, items: list[Item]) -> ChatRequest:
    """The chat after `items`, the response's whole context. Raises `ApiError`."""
    sampling = {name: getattr(fields, name) for name in SamplingFields.__struct_fields__}
    logprobs = fields.top_logprobs is not None or _LOGPROBS in (fields.include or ())
    return ChatRequest(
        messages=messages_of(items, fields.instructions),
        max_completion_tokens=fields.max_output_tokens,
        logprobs=logprobs,
        top_logprobs=(fields.top_logprobs or 0) if logprobs else None,
        tools=None if fields.tools is None else [_chat_tool(tool) for tool in fields.tools],
        tool_choice=_chat_tool_choice(fields),
        parallel_tool_calls=fields.parallel_tool_calls,
        response_format=_response_format(fields),
        reasoning_effort=fields.reasoning.effort if fields.reasoning else None,
        chat_template_kwargs=fields.chat_template_kwargs,
        **sampling,
    )


def new_response(service: Service, fields: ResponsesRequest, id: str, now: int) -> ResponseObject:
    """The response before anything was generated: the request's settings, defaults filled in."""
    text = fields.text
    defaults = service.defaults
    return ResponseObject(
        id=id,
        created_at=now,
        model=service.model_name,
        instructions=fields.instructions,
        max_output_tokens=fields.max_output_tokens,
        metadata=fields.metadata or {},
        parallel_tool_calls=fields.parallel_tool_calls is not False,
        previous_response_id=fields.previous_response_id,
        reasoning=fields.reasoning or ReasoningConfig(),
        store=fields.store,
        temperature=defaults.temperature if fields.temperature is None else fields.temperature,
        text=TextSettings((text and text.format) or {"type": "text"}),
        tool_choice=fields.tool_choice or "auto",
        tools=fields.tools or [],
        top_logprobs=fields.top_logprobs or 0,
        top_p=defaults.top_p if fields.top_p is None else fields.top_p,
        user=fields.user,
    )


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    function = msgspec.to_builtins(tool)
    return {"type": function.pop("type"), "function": function}


def _chat_tool_choice(fields: ResponsesRequest) -> str | dict[str, Any] | None:
    """Here the default may be spelled out without tools, as every response does."""
    if not fields.tools and fields.tool_choice in ("auto", "none"):
        return None
    return _nested(fields.tool_choice)


def _nested(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """Here a choice is flat: `{"type": "function", "name": …}`."""
    if not isinstance(choice, dict):
        return choice
    flat = dict(choice)
    kind = flat.pop("type", None)
    match kind:
        case "function":
            return {"type": kind, kind: flat}
        case "allowed_tools":
            allowed = flat.get("tools")
            if isinstance(allowed, list):
                flat["tools"] = [_nested(tool) for tool in allowed]
            return {"type": kind, kind: flat}
    raise _bad("tool_choice.type", "expected function or allowed_tools")


def _response_format(fields: ResponsesRequest) -> Any:
    """`text.format` as chat's `response_format`: a schema's name and options are one level up."""
    given = fields.text.format if fields.text is not None else None
    if given is None:
        return None
    nested = dict(given)
    if nested.get("type") == "json_schema":
        nested = {"type": nested.pop("type"), "json_schema": nested}
    with renamed(own_name):
        return convert({"messages": [{}], "response_format": nested}, ChatRequest).response_format


def own_name(param: str) -> str:
    """The field of this API that a chat request's field came from."""
    for theirs, ours in _FIELDS.items():
        if param.startswith(theirs):
            return ours + param[len(theirs) :]
    return re.sub(r"^(tools\[\d+\]|tool_choice)\.(function|allowed_tools)", r"\1", param)


def _bad(param: str, message: str) -> ApiError:
    return ApiError(f"{param}: {message}", param=param, code="invalid_value")
