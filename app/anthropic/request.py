"""An Anthropic request as the chat request that it comes to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from app.http.body import convert
from app.http.errors import ApiError, renamed
from app.schemas.chat import ChatRequest
from app.schemas.messages import (
    AnthropicMessage,
    AnthropicTool,
    AnthropicToolChoice,
    CountTokensRequest,
    MessagesRequest,
)

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_FIELDS = {
    "stop": "stop_sequences",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
}


def chat_request(fields: CountTokensRequest) -> ChatRequest:
    """The chat of a request, or of one whose tokens are only counted. Raises `ApiError`."""
    settings = fields if isinstance(fields, MessagesRequest) else None
    choice = fields.tool_choice
    last = fields.messages[-1]
    goes_on = last.role == "assistant" and not _calls(last)  # the answer continues it
    return ChatRequest(
        messages=[*_system(fields.system), *_messages(fields.messages)],
        max_tokens=settings.max_tokens if settings else None,
        temperature=settings.temperature if settings else None,
        top_p=settings.top_p if settings else None,
        top_k=settings.top_k if settings else None,
        stop=settings.stop_sequences if settings else None,
        tools=None if fields.tools is None else [_tool(tool) for tool in fields.tools],
        tool_choice=_tool_choice(choice),
        parallel_tool_calls=not (choice.disable_parallel_tool_use or False) if choice else None,
        response_format=_response_format(fields),
        reasoning_effort=fields.output_config.effort if fields.output_config else None,
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
        chat_template_kwargs=_template_variables(fields),
    )


def asks_to_cache(fields: CountTokensRequest) -> bool:
    """Whether the request marks what is to be cached, as Anthropic's clients do."""
    contents = [fields.system, *(message.content for message in fields.messages)]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    marks = [
        fields.cache_control,
        *(tool.cache_control for tool in fields.tools or ()),
        *(block.get("cache_control") for block in blocks),
    ]
    return any(mark is not None for mark in marks)


def own_name(param: str) -> str:
    """The field of this API that a chat request's field came from."""
    for theirs, ours in _FIELDS.items():
        if re.match(rf"{re.escape(theirs)}(?!\w)", param):
            return ours + param[len(theirs) :]
    param = re.sub(r"^(tools\[\d+\])\.function\.parameters", r"\1.input_schema", param)
    return re.sub(r"^(tools\[\d+\]|tool_choice)\.function", r"\1", param)


def _template_variables(fields: CountTokensRequest) -> dict[str, Any] | None:
    """Thinking is the model's default unless the request has a say in it."""
    if fields.thinking is None:
        return fields.chat_template_kwargs
    thinks = fields.thinking.type != "disabled"
    return {"enable_thinking": thinks} | (fields.chat_template_kwargs or {})


def _system(content: Any) -> Iterator[dict[str, Any]]:
    if content:
        yield {"role": "system", "content": _texts(content, "system")}


def _messages(messages: list[AnthropicMessage]) -> Iterator[dict[str, Any]]:
    for i, message in enumerate(messages):
        path = f"messages[{i}].content"
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
        elif message.role == "user":
            yield from _user(message.content, path)
        elif message.role == "assistant":
            yield _assistant(message.content, path)
        else:
            yield {"role": "system", "content": _texts(message.content, path)}


def _user(blocks: list[dict[str, Any]], path: str) -> Iterator[dict[str, Any]]:
    """Tool results are messages of their own; the text between them is joined."""
    texts: list[str] = []
    for i, block in enumerate(blocks):
        where = f"{path}[{i}]"
        if block.get("type") != "tool_result":
            texts.append(_text(block, where, "text or tool_result"))
            continue
        if texts:
            yield {"role": "user", "content": "\n".join(texts)}
            texts = []
        result = _texts(block.get("content") or "", f"{where}.content")
        yield {
            "role": "tool",
            "tool_call_id": _string(block, "tool_use_id", where),
            # Templates have no other place to say so.
            "content": f"Error: {result}" if block.get("is_error") is True else result,
        }
    if texts or not blocks:
        yield {"role": "user", "content": "\n".join(texts)}


def _assistant(blocks: list[dict[str, Any]], path: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        where = f"{path}[{i}]"
        match block.get("type"):
            case "thinking":
                thoughts.append(_string(block, "thinking", where))
            case "tool_use":
                if not isinstance(block.get("input"), dict):
                    raise _bad(f"{where}.input", "expected an object")
                function = {"name": _string(block, "name", where), "arguments": block["input"]}
                id = _string(block, "id", where)
                calls.append({"id": id, "type": "function", "function": function})
            case _:
                texts.append(_text(block, where, "text, thinking or tool_use"))
    if texts:
        message["content"] = "\n".join(texts)
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _calls(message: AnthropicMessage) -> bool:
    blocks = [] if isinstance(message.content, str) else message.content
    return any(block.get("type") == "tool_use" for block in blocks)


def _texts(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise _bad(path, "expected a string or a list of text blocks")
    return "\n".join(_text(block, f"{path}[{i}]", "text") for i, block in enumerate(content))


def _text(block: dict[str, Any], path: str, known: str) -> str:
    if block.get("type") != "text":
        raise _bad(f"{path}.type", f"expected {known}; nothing else is known here")
    return _string(block, "text", path)


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: AnthropicToolChoice | None) -> str | dict[str, Any] | None:
    if choice is None:
        return None
    if choice.type != "tool":
        return _CHOICES[choice.type]
    if choice.name is None:
        raise _bad("tool_choice.name", "required with type tool")
    return {"type": "function", "function": {"name": choice.name}}


def _response_format(fields: CountTokensRequest) -> Any:
    format = fields.output_config.format if fields.output_config else None
    if format is None:
        return None
    schema = {"name": "output", "schema": format.schema, "strict": True}
    nested = {"type": "json_schema", "json_schema": schema}
    with renamed(own_name):
        return convert({"messages": [{}], "response_format": nested}, ChatRequest).response_format


def _string(block: dict[str, Any], name: str, path: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise _bad(f"{path}.{name}", "expected a string")
    return value


def _bad(param: str, message: str) -> ApiError:
    return ApiError(f"{param}: {message}", param=param, code="invalid_value")
