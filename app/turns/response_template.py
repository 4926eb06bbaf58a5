"""Turns of models whose tokenizer says how to read them: transformers' `response_template`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from app.turns.formats import Think
from app.turns.parts import CallArguments, CallBegin, Part, Reasoning, Text, merged

_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = "tool_calls"


def load(spec: Any) -> Any:
    """The compiled template. Raises `ValueError` with what is wrong with it."""
    from transformers.utils.chat_parsing.response_templates import load_response_template

    return load_response_template(spec)


def think(template: Any) -> Think | None:
    """The texts around reasoning, if they are always the same."""
    for name in _REASONING:
        field = template.fields.get(name)
        if field is not None and field.open_literals and field.close_literals:
            return Think(field.open_literals[0], field.close_literals[0])
    return None


class TemplateParser:
    """A `TurnParser`. Text streams; a call comes whole, when the template has read it.

    White space around a region is not part of it. What the template cannot read is text, and so
    is everything after it.
    """

    def __init__(
        self,
        template: Any,
        prompt: str,
        tools: Sequence[dict[str, Any]],
        new_id: Callable[[], str],
        *,
        one_call: bool = False,
    ) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        self._parser: Any = ResponseParser(template, prefix=prompt, tools=list(tools))
        self._names = {tool["function"]["name"] for tool in tools}
        self._new_id = new_id
        self._one_call = one_call
        self._field: str | None = None
        self._region = ""  # the open region's text
        self._space = ""  # at its end: given when more follows
        self._calls = 0
        self._broken = False
        self.done = False
        self._take(self._parser.initial_events)  # what the prompt opened; its text is the prompt's

    @property
    def reasoning(self) -> bool:
        return self._field in _REASONING

    def feed(self, text: str) -> list[Part]:
        if self._broken:
            return [Text(text)] if text else []
        try:
            events = self._parser.feed(text)
        except Exception:  # whatever the template makes of what the model wrote
            return self._give_up(text)
        return merged(self._take(events))

    def finish(self) -> list[Part]:
        if self._broken:
            return []
        try:
            _, events = self._parser.finalize()
        except Exception:
            return self._give_up("")
        return merged(self._take(events))

    def _give_up(self, text: str) -> list[Part]:
        self._broken = True
        held = self._region if self._field == _CALLS else ""
        return [Text(held + text)] if held + text else []

    def _take(self, events: Sequence[dict[str, Any]]) -> list[Part]:
        parts: list[Part] = []
        for event in events:
            if self.done:
                break
            match event["type"]:
                case "region_open":
                    self._field, self._region, self._space = event["field"], "", ""
                case "region_chunk":
                    parts += self._chunk(event["text"])
                case "region_close":
                    if self._field == _CALLS and self._names:
                        parts += self._close_calls(event["value"])
                    self._field = None
        return parts

    def _chunk(self, text: str) -> list[Part]:
        before = self._region
        self._region += text
        if self._field == _CALLS and self._names:
            return []
        if not before.strip():
            text = text.lstrip()
        kept = text.rstrip()
        if not kept:
            self._space += text
            return []
        given, self._space = self._space + kept, text[len(kept) :]
        return [Reasoning(given) if self._field in _REASONING else Text(given)]

    def _close_calls(self, value: Any) -> list[Part]:
        values = value if isinstance(value, list) else [value]
        calls = [call for call in map(_call, values) if call and call[0] in self._names]
        if not calls or len(calls) < len(values):
            return [Text(self._region)]
        if self._one_call:
            calls, self.done = calls[:1], True
        parts: list[Part] = []
        for name, arguments in calls:
            parts += (
                CallBegin(self._calls, self._new_id(), name),
                CallArguments(self._calls, arguments),
            )
            self._calls += 1
        return parts


def _call(value: Any) -> tuple[str, str] | None:
    """Name and arguments of one of the template's calls, if it is one."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        return function["name"], arguments
    if not isinstance(arguments, dict):
        return None
    return function["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False)
