"""What a chat's turn may be, as a grammar: forced calls, strict ones, an answer after thinking.

llguidance's Lark: `%json` nests a schema with definitions of its own, `<[17]>` is a token. Markers
may be tokens that are no text to llguidance, so they are written both ways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from app.inputs.tokenizer import Tokenizer
from app.inputs.tools import Tool, ToolUse
from app.structured.request import RequestedGrammar
from app.structured.schema import has_free_keys, prepare_schema
from app.turns.formats import HERMES, CallFormat
from app.turns.style import TurnStyle
from batching.core.types import Grammar

# More calls in one turn are not forced upon anybody: a model that cannot stop must end.
MAX_CALLS = 16
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_ANY_OBJECT = {"type": "object"}


def turn_grammar(
    style: TurnStyle,
    tokenizer: Tokenizer,
    use: ToolUse,
    prompt: str,
    asked: RequestedGrammar | None,
    *,
    to_the_end: bool,
) -> RequestedGrammar | None:
    """The grammar of the turn after `prompt`; None if it may be anything.

    `asked` is that of the answer alone. Where tools may be called, calls may come instead of it;
    where they must be, it is left aside. Thinking comes before either. Raises `ApiError` naming a
    tool whose parameters are no schema.
    """
    writer = _Writer(style, tokenizer, use.given)
    source = writer.turn(use, prompt, None if asked is None else asked.grammar.source)
    if source is None:
        return None
    if asked is not None and source == asked.grammar.source:
        return asked
    param = "tools" if asked is None or use.forced else asked.param
    free_keys, has_json = writer.free_keys, True
    if asked is not None and not use.forced:
        free_keys = free_keys or asked.grammar.free_keys
        has_json = asked.grammar.has_json
    after = tuple(writer.json_after) if free_keys else ("",)
    grammar = Grammar(source, to_the_end, free_keys, has_json, after)
    return RequestedGrammar(grammar, param)


def _named(source: str, name: str) -> dict[str, Any]:
    if source.startswith("{"):
        (grammar,) = json.loads(source)["grammars"]
        return {"name": name, **grammar}
    return {"name": name, "lark_grammar": source}


class _Writer:
    """Writes rules for one model's format."""

    def __init__(self, style: TurnStyle, tokenizer: Tokenizer, tools: list[Tool]) -> None:
        self._format: CallFormat = style.calls or HERMES
        self._knows_format = style.calls is not None and style.response is None
        self._think = style.think
        self._tools = tools
        self._tokenizer = tokenizer
        form = self._format
        self._markers = sorted({*form.openers, *form.special, form.closer or form.openers[0]})
        self.rules: list[str] = []
        self.free_keys = False  # of arguments that are held to their schema
        self.json_after = ["", *self._markers]

    def turn(self, use: ToolUse, prompt: str, answer: str | None) -> str | None:
        """The source for the turn after `prompt`, from that of the answer alone."""
        if use.forced:
            turn = self.calls(use.callable, one=use.one_call)
        elif answer is not None:
            turn = "@answer"
            if use.callable and (calls := self.marked_calls(use.callable, one=use.one_call)):
                turn += f" | {calls}"
        elif any(tool["function"].get("strict") for tool in use.callable):
            free = self.free_calls(use.callable)
            if free is None:
                return None
            turn = free
        else:
            return None
        thought = self.thought(prompt)
        if answer is not None and turn == "@answer" and not thought:
            return answer
        lark = "\n".join([f"start: {thought} turn", f"turn: {turn}", *self.rules])
        if "@answer" not in turn:
            return lark
        assert answer is not None
        return json.dumps({"grammars": [{"lark_grammar": lark}, _named(answer, "answer")]})

    def calls(self, tools: Collection[Tool], *, one: bool) -> str:
        """One call, or several of them."""
        form = self._format
        self._add_call_rule(tools, strict=True)
        more = "" if one else f"({self._text(form.forced_between)} call){{0,{MAX_CALLS - 1}}}"
        return f"{self._text(form.forced_begin)} call {more} {self._text(form.forced_end)}"

    def marked_calls(self, tools: Collection[Tool], *, one: bool) -> str | None:
        """The same, told from JSON that is none by a marker. None if there is no such marker."""
        opener = self._format.openers[0]
        if not self._format.at_start:
            return self.calls(tools, one=one)
        if self._tokenizer.backend.token_to_id(opener) is None:
            return None
        return f"{self._marker(opener)} {self.calls(tools, one=one)}"

    def free_calls(self, tools: Collection[Tool]) -> str | None:
        """Text, and calls among it that are what they should be. None if their form is unknown."""
        form = self._format
        if not self._knows_format:
            return None
        self._add_call_rule(tools, strict=False)
        if not form.at_start:
            self.json_after.remove("")
        if form.at_start:  # calls alone, or a text that does not begin like one
            opener, between = self._text(form.openers[0]), self._text(form.forced_between)
            self.rules.append(_text_without(r'\s*\{\s*"name"(.|\n)*'))
            return f"({opener})? call ({between} call)* | TEXT?"
        (opener,) = form.openers
        self.rules.append(_text_without(rf"(.|\n)*{_escaped(opener)}(.|\n)*"))
        self._add_up_to_rule("opened", "TEXT", opener)
        begin, between, end = map(
            self._text,
            (form.forced_begin.removeprefix(opener), form.forced_between, form.forced_end),
        )
        return f"(opened {begin} call ({between} call)* {end})* TEXT?"

    def _add_call_rule(self, tools: Collection[Tool], *, strict: bool) -> None:
        """`strict`: of all tools, whether or not they ask for it."""
        before, after = self._format.forced
        names = []
        for i, tool in enumerate(tools):
            function = tool["function"]
            schema = function.get("parameters") if strict or function.get("strict") else {}
            schema = _NO_PARAMETERS if schema is None else {**_ANY_OBJECT, **schema}
            path = f"tools[{self._tools.index(tool)}].function.parameters"
            prepared = prepare_schema(schema, path)
            if strict or function.get("strict"):
                self.free_keys = self.free_keys or has_free_keys(prepared)
            arguments = json.dumps(prepared)
            head, tail = self._text(before % function["name"]), self._text(after)
            self.rules.append(f"call_{i}: {head} arguments_{i} {tail}")
            self.rules.append(f"arguments_{i}: %json {arguments}")
            names.append(f"call_{i}")
        self.rules.append(f"call: {' | '.join(names)}")

    def thought(self, prompt: str) -> str:
        """What the model may think before all else: nothing if it does not, or must not."""
        think = self._think
        if think is None or prompt.rstrip().endswith(think.close):
            return ""
        self.rules.append(_text_without(rf"(.|\n)*{_escaped(think.close)}(.|\n)*", "THOUGHT"))
        self._add_up_to_rule("thinking", "THOUGHT", think.close)
        self.rules += ["thought: thinking SPACE?", r"SPACE: /[ \n]{1,4}/"]
        self.json_after.append(think.close)
        if prompt.rstrip().endswith(think.open):
            self.json_after = [text for text in self.json_after if text]
            return "thought"
        return f"({self._marker(think.open)} thought)?"

    def _add_up_to_rule(self, name: str, text: str, marker: str) -> None:
        """`name` is a `text`, which has no marker, and the marker, as a token or as text."""
        token = self._tokenizer.backend.token_to_id(marker)
        by_token = "" if token is None else f" | {text}? <[{token}]>"
        self.rules.append(f"{name}: {name}_lazily{by_token}")
        self.rules.append(rf"{name}_lazily[lazy]: /(.|\n)*{_escaped(marker)}/")

    def _text(self, text: str) -> str:
        """A literal, in which markers may be tokens."""
        if not text:
            return ""
        pieces = re.split(f"({'|'.join(map(re.escape, self._markers))})", text)
        return " ".join(
            self._marker(piece) if piece in self._markers else json.dumps(piece)
            for piece in pieces
            if piece
        )

    def _marker(self, marker: str) -> str:
        token = self._tokenizer.backend.token_to_id(marker)
        return json.dumps(marker) if token is None else f"(<[{token}]> | {json.dumps(marker)})"


def _text_without(pattern: str, name: str = "TEXT") -> str:
    return rf"{name}: /(.|\n)+/ & ~/{pattern}/"


def _escaped(literal: str) -> str:
    return re.escape(literal).replace("/", r"\/")
