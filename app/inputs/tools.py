"""The tools of a chat request: what is one, and which may or must be called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from app.http.errors import ApiError

Tool = dict[str, Any]

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_KEYS = {"type", "function"}
_FUNCTION_KEYS = {"name", "description", "parameters", "strict"}


class ToolFields(Protocol):
    """The request fields that say what may be called."""

    @property
    def tools(self) -> list[Tool] | None: ...
    @property
    def tool_choice(self) -> str | dict[str, Any] | None: ...
    @property
    def parallel_tool_calls(self) -> bool | None: ...


class ToolUse(NamedTuple):
    """What a request's tools come to."""

    given: list[Tool]
    shown: list[Tool]  # reach the prompt
    callable: list[Tool]  # whose calls are calls and not text
    forced: bool = False  # at least one is called, and nothing else said
    named: bool = False  # by name, so that it is known which
    one_call: bool = False


def check_tools(tools: list[Tool] | None) -> None:
    """Raises `ApiError` for what is no function, or has the name of another."""
    names: set[str] = set()
    for i, tool in enumerate(tools or ()):
        path = f"tools[{i}]"
        if tool.get("type") != "function":
            raise _bad(f"{path}.type", "expected function; there are no other kinds of tools")
        function = _object(tool.get("function"), f"{path}.function")
        _only(tool, _KEYS, path)
        _check_function(function, f"{path}.function")
        if function["name"] in names:
            raise _bad(f"{path}.function.name", "another tool has this name")
        names.add(function["name"])


def _check_function(function: Tool, path: str) -> None:
    _only(function, _FUNCTION_KEYS, path)
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _bad(f"{path}.name", "expected 1 to 64 letters, digits, underscores and dashes")
    if not isinstance(function.get("description") or "", str):
        raise _bad(f"{path}.description", "expected a string")
    if not isinstance(function.get("strict") or False, bool):
        raise _bad(f"{path}.strict", "expected a boolean")
    if function.get("parameters") is not None:
        parameters = _object(function["parameters"], f"{path}.parameters")
        if parameters.get("type", "object") != "object":
            raise _bad(f"{path}.parameters", "expected a JSON schema of type object")


def tool_use(fields: ToolFields) -> ToolUse:
    """What `tool_choice` makes of checked tools. Raises `ApiError` for one that makes no sense."""
    tools, choice = fields.tools or [], fields.tool_choice
    one_call = fields.parallel_tool_calls is False
    if not tools and choice is not None:
        raise _bad("tool_choice", "only allowed with tools")
    if choice == "none":
        return ToolUse(tools, tools, [])
    if choice in (None, "auto"):
        return ToolUse(tools, tools, tools, one_call=one_call)
    if choice == "required":
        return ToolUse(tools, tools, tools, forced=True, one_call=one_call)
    if not isinstance(choice, dict):
        raise _bad("tool_choice", "expected none, auto, required or an object that names a tool")
    match choice.get("type"):
        case "function":
            _only(choice, _KEYS, "tool_choice")
            found = _find(choice, tools, "tool_choice")
            return ToolUse(tools, tools, [found], forced=True, named=True, one_call=True)
        case "allowed_tools":
            return _allowed(choice, tools, one_call)
    raise _bad("tool_choice.type", "expected function or allowed_tools")


def _allowed(choice: dict[str, Any], tools: list[Tool], one_call: bool) -> ToolUse:
    path = "tool_choice.allowed_tools"
    _only(choice, {"type", "allowed_tools"}, "tool_choice")
    allowed = _object(choice.get("allowed_tools"), path)
    _only(allowed, {"mode", "tools"}, path)
    if allowed.get("mode") not in ("auto", "required"):
        raise _bad(f"{path}.mode", "expected auto or required")
    if not isinstance(named := allowed.get("tools"), list) or not named:
        raise _bad(f"{path}.tools", "expected a list of tools")
    names = {
        _find(_object(tool, f"{path}.tools[{i}]"), tools, f"{path}.tools[{i}]")["function"]["name"]
        for i, tool in enumerate(named)
    }
    left = [tool for tool in tools if tool["function"]["name"] in names]
    return ToolUse(tools, left, left, forced=allowed["mode"] == "required", one_call=one_call)


def _find(choice: dict[str, Any], tools: list[Tool], path: str) -> Tool:
    function = _object(choice.get("function"), f"{path}.function")
    for tool in tools:
        if tool["function"]["name"] == function.get("name"):
            return tool
    raise _bad(f"{path}.function.name", "names none of the tools")


def _object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(path, "expected an object")
    return value


def _only(value: Mapping[str, Any], known: set[str], path: str) -> None:
    if unknown := set(value) - known:
        name = f"{path}.{min(unknown)}"
        raise ApiError(f"unknown field: {name}", param=name, code="unknown_parameter")


def _bad(path: str, message: str) -> ApiError:
    return ApiError(f"{path}: {message}", param=path, code="invalid_value")
