"""Chat messages as the API takes them, made into what templates read."""

from __future__ import annotations

from typing import Any

import msgspec

from app.http.errors import ApiError

_ROLES = ("system", "developer", "user", "assistant", "tool")


def template_messages(messages: list[Any], *, has_developer_role: bool) -> list[dict[str, Any]]:
    """Check `messages` and bring them to the form of `transformers`' templates.

    Content parts are joined by newlines; absent content is ""; a tool call's arguments become an
    object; `developer` is `system` where the template does not know it; `reasoning` is
    `reasoning_content`. Fields beyond these reach the template as they are. Raises `ApiError`
    naming the message.
    """
    return [
        _message(message, f"messages[{i}]", has_developer_role)
        for i, message in enumerate(messages)
    ]


def _message(message: Any, path: str, has_developer_role: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _bad(path, "expected an object")
    result = {key: value for key, value in message.items() if value is not None}
    role = result.get("role")
    if role not in _ROLES:
        raise _bad(f"{path}.role", f"expected one of {', '.join(_ROLES)}")
    if role == "developer" and not has_developer_role:
        result["role"] = "system"
    if role == "assistant" and "reasoning" in result:
        result.setdefault("reasoning_content", result.pop("reasoning"))
    for name in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(result.get(name, ""), str):
            raise _bad(f"{path}.{name}", "expected a string")
    if "content" not in result and role != "assistant":
        raise _bad(f"{path}.content", f"a {role} message needs content")
    if "tool_call_id" not in result and role == "tool":
        raise _bad(f"{path}.tool_call_id", "a tool message needs the id of the call it answers")
    kinds = ("text", "refusal") if role == "assistant" else ("text",)
    result["content"] = _content(result.get("content", ""), f"{path}.content", kinds)
    if "tool_calls" in result:
        result["tool_calls"] = _tool_calls(result["tool_calls"], f"{path}.tool_calls")
    return result


def _content(content: Any, path: str, kinds: tuple[str, ...]) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _bad(path, "expected a string or a list of content parts")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict):
            raise _bad(f"{path}[{i}]", "expected an object")
        if (kind := part.get("type")) not in kinds:
            raise _bad(f"{path}[{i}].type", f"expected {' or '.join(kinds)}")
        if not isinstance(part.get(kind), str):
            raise _bad(f"{path}[{i}].{kind}", "expected a string")
        texts.append(part[kind])
    return "\n".join(texts)


def _tool_calls(calls: Any, path: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise _bad(path, "expected a list of tool calls")
    return [_tool_call(call, f"{path}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, path: str) -> dict[str, Any]:
    if not isinstance(call, dict) or call.get("type", "function") != "function":
        raise _bad(f"{path}.type", "expected a call of type function")
    if not isinstance(call.get("id", ""), str):
        raise _bad(f"{path}.id", "expected a string")
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _bad(f"{path}.function.name", "expected a string")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (ValueError, RecursionError):
            raise _bad(f"{path}.function.arguments", "expected JSON") from None
    if not isinstance(arguments, dict):
        raise _bad(f"{path}.function.arguments", "expected an object as JSON text")
    return {**call, "function": {**function, "arguments": arguments}}


def _bad(path: str, message: str) -> ApiError:
    return ApiError(f"{path}: {message}", param=path, code="invalid_value")
