"""The grammars of turns, by what they let through, and what the parser makes of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer as Backend

from app.http.errors import ApiError
from app.inputs.tokenizer import Tokenizer
from app.inputs.tools import ToolUse
from app.structured.request import RequestedGrammar
from app.turns import formats
from app.turns.formats import Think
from app.turns.grammar import MAX_CALLS, turn_grammar
from app.turns.parser import MarkerParser
from app.turns.parts import Turn
from app.turns.style import TurnStyle
from batching.core.types import Grammar

THINK = Think("<think>", "</think>")
FORMATS = {
    "hermes": formats.HERMES,
    "llama3": formats.LLAMA3,
    "mistral": formats.MISTRAL,
    "mistral_args": formats.MISTRAL_ARGS,
    "deepseek": formats.DEEPSEEK,
}
PROMPTS = {"": "<think>hm\n</think>\n\n", "<think>\n": "a <b\n</think>\n", "<think></think>": ""}
SPECIAL = ["[TOOL_CALLS]", "[ARGS]", "<think>", "</think>", "<tool_call>", "<|python_tag|>"]
SPECIAL += [*formats.DEEPSEEK.openers, *formats.DEEPSEEK.special]
ANSWER = '{"grammars": [{"json_schema": {"const": {"a": 5}}}]}'

Said = list[tuple[str, dict[str, Any]]]


class Vocabulary:
    """A tokenizer and a check of texts against grammars."""

    def __init__(self, model_folder: Path, special: list[str]) -> None:
        backend = Backend.from_file(str(model_folder / "tokenizer.json"))
        backend.add_special_tokens(special)
        self._backend = backend
        self.tokenizer = Tokenizer(backend)
        self.marked = bool(special)  # markers are tokens
        self._llguidance = LLTokenizer(backend.to_str(), None, [0])

    def allows(self, source: str | None, text: str) -> bool:
        """Whether the text is complete in the grammar."""
        assert source is not None
        matcher = LLMatcher(self._llguidance, source, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.fixture(scope="module", params=[SPECIAL, []], ids=["special", "plain"])
def vocabulary(request: Any, model_folder: Path) -> Vocabulary:
    """Markers may be special tokens or plain text."""
    return Vocabulary(model_folder, request.param)


def tool(name: str, kind: str, **more: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/X"}},
        "required": ["x"],
        "$defs": {"X": {"type": kind}},
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [tool("f", "string", strict=True), tool("g", "integer")]
FORCED = ToolUse(TOOLS, TOOLS, TOOLS, forced=True)
FREE = ToolUse(TOOLS, TOOLS, TOOLS)
GOOD: Said = [("f", {"x": "s"}), ("g", {"x": 3})]
BAD: list[Said] = [[("g", {"x": "s"})], [("f", {"x": 3})], [("f", {})], [("h", {"x": "s"})]]


def turn_source(
    style: TurnStyle, tokenizer: Tokenizer, use: ToolUse, prompt: str, answer: str | None
) -> str | None:
    asked = None if answer is None else RequestedGrammar(Grammar(answer), "answer")
    turn = turn_grammar(style, tokenizer, use, prompt, asked, to_the_end=False)
    return None if turn is None else turn.grammar.source


def written(form: formats.CallFormat, said: Said) -> str:
    before, after = form.forced
    calls = [before % name + json.dumps(arguments) + after for name, arguments in said]
    return form.forced_begin + form.forced_between.join(calls) + form.forced_end


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls(vocabulary: Vocabulary, name: str, prompt: str) -> None:
    form = FORMATS[name]
    source = turn_source(TurnStyle(form, THINK), vocabulary.tokenizer, FORCED, prompt, None)
    thought = PROMPTS[prompt]
    text = thought + written(form, GOOD)
    assert vocabulary.allows(source, text)
    opened = prompt == "<think>\n"
    parser = MarkerParser(form, THINK, names=("f", "g"), in_reasoning=opened)
    turn = Turn.of([*parser.feed(text), *parser.finish()])
    assert [(call.name, json.loads(call.arguments)) for call in turn.calls] == GOOD
    assert bool(turn.reasoning) == bool(thought) and not turn.text
    assert not any(vocabulary.allows(source, thought + written(form, said)) for said in BAD)
    for other in ("hello", "", written(form, GOOD)[:-1], "hello" + written(form, GOOD)):
        assert not vocabulary.allows(source, thought + other)
    assert vocabulary.allows(source, written(form, GOOD)) == (not opened)
    assert vocabulary.allows(source, thought + written(form, GOOD[:1] * MAX_CALLS))
    assert not vocabulary.allows(source, thought + written(form, GOOD[:1] * (MAX_CALLS + 1)))


@pytest.mark.parametrize("name", FORMATS)
def test_one_call(vocabulary: Vocabulary, name: str) -> None:
    form, use = FORMATS[name], FORCED._replace(one_call=True)
    source = turn_source(TurnStyle(form), vocabulary.tokenizer, use, "", None)
    assert vocabulary.allows(source, written(form, GOOD[:1]))
    assert not vocabulary.allows(source, written(form, GOOD))


@pytest.mark.parametrize("name", FORMATS)
def test_strict_calls_among_text(vocabulary: Vocabulary, name: str) -> None:
    """Only the tool that asks for it is held to its parameters; the other's are an object."""
    form = FORMATS[name]
    source = turn_source(TurnStyle(form, THINK), vocabulary.tokenizer, FREE, "", None)
    for text in ("", "so\n{x}", "<think>hm</think>so", written(form, GOOD)):
        assert vocabulary.allows(source, text)
    assert vocabulary.allows(source, written(form, [("f", {"x": "s"}), ("g", {"y": 3})]))
    assert vocabulary.allows(source, "so\n" + written(form, GOOD))
    assert not vocabulary.allows(source, written(form, [("f", {"x": 3})]))
    assert not vocabulary.allows(source, written(form, [("h", {})]))
    for style in (TurnStyle(None), TurnStyle(form, response=object())):
        assert turn_source(style, vocabulary.tokenizer, FREE, "", None) is None


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_or_calls(vocabulary: Vocabulary, name: str) -> None:
    form = FORMATS[name]
    source = turn_source(TurnStyle(form, THINK), vocabulary.tokenizer, FREE, "", ANSWER)
    for thought in ("", "<think>hm</think>\n"):
        assert vocabulary.allows(source, thought + '{"a": 5}')
        assert not vocabulary.allows(source, thought + '{"a": 6}')
        if name != "llama3" or vocabulary.marked:
            called = thought + ("<|python_tag|>" if name == "llama3" else "")
            assert vocabulary.allows(source, called + written(form, GOOD))
    assert not vocabulary.allows(source, "hello")


def test_an_answer_alone(vocabulary: Vocabulary) -> None:
    style, none = TurnStyle(think=THINK), ToolUse([], [], [])
    tokenizer = vocabulary.tokenizer
    assert turn_source(style, tokenizer, none, "", None) is None
    assert turn_source(style, tokenizer, none, "<think></think>", ANSWER) == ANSWER
    assert turn_source(TurnStyle(), tokenizer, none, "", ANSWER) == ANSWER
    for answer, text in ((ANSWER, '{"a": 5}'), ("start: /[0-9]+/", "55")):
        source = turn_source(style, tokenizer, none, "<think>\n", answer)
        assert vocabulary.allows(source, f"hm {text}</think>\n{text}")
        assert not vocabulary.allows(source, text)
        assert not vocabulary.allows(source, f"hm</think>x{text}")


def test_bad_parameters_are_named(vocabulary: Vocabulary) -> None:
    tools = [TOOLS[0], tool("bad", "no such type")]
    use = ToolUse(tools, tools, tools[1:], forced=True, named=True, one_call=True)
    with pytest.raises(ApiError) as error:
        turn_source(TurnStyle(), vocabulary.tokenizer, use, "", None)
    assert error.value.param == "tools[1].function.parameters.properties.x.type"


@pytest.mark.parametrize(("parameters", "allowed"), [(None, ["{}"]), ({}, ["{}", '{"a": [1]}'])])
def test_parameters_that_say_little(
    vocabulary: Vocabulary, parameters: Any, allowed: list[str]
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    use = ToolUse(tools, tools, tools, forced=True)
    source = turn_source(TurnStyle(), vocabulary.tokenizer, use, "", None)
    for arguments in ("{}", '{"a": [1]}', "[]", "5"):
        said = written(formats.HERMES, [("f", json.loads(arguments))])
        assert vocabulary.allows(source, said) == (arguments in allowed)
