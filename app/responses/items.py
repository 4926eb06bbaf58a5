"""Input items: checked, given ids, and made into the messages of a chat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import uuid4

import msgspec

from app.http.errors import ApiError

Item = dict[str, Any]

_ROLES = ("user", "assistant", "system", "developer")
_TEXT_PARTS = ("input_text", "output_text", "text")


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex}"


def input_items(given: str | list[Any]) -> list[Item]:
    """The request's `input` as complete items, each with an id. Raises `ApiError` naming one."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not given:
        raise _bad("input", "the list is empty")
    return [_item(item, f"input[{i}]") for i, item in enumerate(given)]


def messages_of(items: Iterable[Item], instructions: str | None) -> list[dict[str, Any]]:
    """A chat's messages. What an assistant thought, said and called in one turn is one message."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        match item["type"]:
            case "function_call_output":
                messages.append(
                    {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
                )
            case "message" if item["role"] != "assistant":
                messages.append({"role": item["role"], "content": _text(item["content"])})
            case "message":
                turn = _assistant(messages, {"content", "tool_calls"})
                turn["content"] = _text(item["content"])
            case "reasoning":
                turn = _assistant(messages, {"role"})
                turn["reasoning_content"] = _text(item["content"] or item["summary"])
            case "function_call":
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                _assistant(messages, set()).setdefault("tool_calls", []).append(call)
    return messages


def _assistant(messages: list[dict[str, Any]], closed_by: set[str]) -> dict[str, Any]:
    """The assistant's message at the end, unless it has one of these fields, else a new one."""
    if not messages or messages[-1]["role"] != "assistant" or closed_by & messages[-1].keys():
        messages.append({"role": "assistant"})
    return messages[-1]


def _item(item: Any, path: str) -> Item:
    if not isinstance(item, dict):
        raise _bad(path, "expected an object")
    item = {key: value for key, value in item.items() if value is not None}
    match item.get("type", "message"):
        case "message":
            return _message(item, path)
        case "function_call":
            return _function_call(item, path)
        case "function_call_output":
            return {
                "id": _string(item, "id", path, new_id("fco")),
                "type": "function_call_output",
                "call_id": _string(item, "call_id", path),
                "output": _output(item.get("output"), f"{path}.output"),
                "status": "completed",
            }
        case "reasoning":
            return {
                "id": _string(item, "id", path, new_id("rs")),
                "type": "reasoning",
                "summary": _parts(item.get("summary", []), f"{path}.summary", ("summary_text",)),
                "content": _parts(item.get("content", []), f"{path}.content", ("reasoning_text",)),
            }
    raise _bad(f"{path}.type", "expected message, function_call, function_call_output or reasoning")


def _message(item: Item, path: str) -> Item:
    role = item.get("role")
    if role not in _ROLES:
        raise _bad(f"{path}.role", f"expected one of {', '.join(_ROLES)}")
    kind = "output_text" if role == "assistant" else "input_text"
    content = item.get("content")
    if isinstance(content, str):
        content = [{"type": kind, "text": content}]
    kinds = (*_TEXT_PARTS, "refusal") if role == "assistant" else _TEXT_PARTS
    parts = _parts(content, f"{path}.content", kinds)
    return {
        "id": _string(item, "id", path, new_id("msg")),
        "type": "message",
        "role": role,
        "content": [_text_part(kind, part["text"]) for part in parts],
        "status": "completed",
    }


def _text_part(kind: str, text: str) -> Item:
    part: Item = {"type": kind, "text": text}
    return part | {"annotations": []} if kind == "output_text" else part


def _function_call(item: Item, path: str) -> Item:
    arguments = _string(item, "arguments", path)
    try:
        valid = isinstance(msgspec.json.decode(arguments or "{}"), dict)
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        raise _bad(f"{path}.arguments", "expected an object as JSON text")
    return {
        "id": _string(item, "id", path, new_id("fc")),
        "type": "function_call",
        "call_id": _string(item, "call_id", path),
        "name": _string(item, "name", path),
        "arguments": arguments,
        "status": "completed",
    }


def _output(output: Any, path: str) -> str:
    if isinstance(output, str):
        return output
    return "\n".join(part["text"] for part in _parts(output, path, _TEXT_PARTS))


def _parts(parts: Any, path: str, kinds: tuple[str, ...]) -> list[Item]:
    """Parts as `{"type", "text"}`."""
    if not isinstance(parts, list):
        raise _bad(path, "expected a string or a list of parts")
    found = []
    for i, part in enumerate(parts):
        if not isinstance(part, dict):
            raise _bad(f"{path}[{i}]", "expected an object")
        if (kind := part.get("type")) not in kinds:
            raise _bad(f"{path}[{i}].type", f"expected {' or '.join(kinds)}; only text is known")
        name = "refusal" if kind == "refusal" else "text"
        if not isinstance(part.get(name), str):
            raise _bad(f"{path}[{i}].{name}", "expected a string")
        found.append({"type": kind, "text": part[name]})
    return found


def _text(parts: Iterable[Item]) -> str:
    return "\n".join(part["text"] for part in parts)


def _string(item: Item, name: str, path: str, default: str | None = None) -> str:
    value = item.get(name, default)
    if not isinstance(value, str):
        raise _bad(f"{path}.{name}", "expected a string")
    return value


def _bad(path: str, message: str) -> ApiError:
    return ApiError(f"{path}: {message}", param=path, code="invalid_value")
