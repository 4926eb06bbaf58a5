"""Text to parts: however it is cut, and back from what each family's template renders."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.inputs.template import ChatTemplate
from app.turns import formats, response_template
from app.turns.parser import MarkerParser, TurnParser
from app.turns.parts import Call, CallArguments, CallBegin, Part, Text, Turn, merged
from app.turns.response_template import TemplateParser
from tests.app.turn_formats import RESPONSE_TEMPLATE, TEMPLATES

THINK = formats.Think("<think>", "</think>")
NAMES = ("get_weather", "f")
TOOLS = [
    {"type": "function", "function": {
        "name": name, "parameters": {"properties": {"n": {"type": "integer"}}}}}
    for name in NAMES
]  # fmt: skip
CALL = '{"name": "f", "arguments": {"a": 1}}'

Outcome = tuple[str, str, list[tuple[str, str]]]


def outcome(parts: list[Part]) -> Outcome:
    turn = Turn.of(parts)
    assert len({call.id for call in turn.calls}) == len(turn.calls)
    return turn.text, turn.reasoning, [(call.name, call.arguments) for call in turn.calls]


def parse(new: Any, text: str) -> Outcome:
    """The outcome, which is the same for every split in two, and character by character."""
    outcomes = []
    for cut in range(len(text) + 1):
        parser: TurnParser = new()
        outcomes.append(
            outcome([*parser.feed(text[:cut]), *parser.feed(text[cut:]), *parser.finish()])
        )
    parser = new()
    outcomes.append(outcome([part for c in text for part in parser.feed(c)] + parser.finish()))
    assert all(other == outcomes[0] for other in outcomes)
    return outcomes[0]


def markers(calls: formats.CallFormat | None, think: Any = None, **options: Any) -> Any:
    return lambda: MarkerParser(calls, think, names=NAMES, **options)


def one(arguments: str = '{"a": 1}', text: str = "", name: str = "f") -> Outcome:
    return text, "", [(name, arguments)]


HERMES_TEXTS = {
    "plain text  ": ("plain text  ", "", []),
    f"hi\n<tool_call>\n{CALL}\n</tool_call>": one(text="hi"),
    f"<tool_call>{CALL}</tool_call>\n bye": one(text="bye"),
    f"<tool_call>{CALL}": one(),
    f"<tool_call>{CALL}}}\n</tool_call>": one(),
    '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>': one('{"a":1}'),
    '<tool_call>{"function": {"name": "f", "arguments": {"a": 1}}}</tool_call>': one('{"a":1}'),
    '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>': one('{"a":1}'),
    '<tool_call>{"name": "f"}</tool_call>': one("{}"),
    '<tool_call>{"name": "f", "arguments": {"s": "</tool_call> \\" }"}}</tool_call>': one(
        '{"s": "</tool_call> \\" }"}'
    ),
    '<tool_call>{"name": "f", "arguments": {"a": 1}, "x": {}}</tool_call> b': one(text="b"),
    '<tool_call>{"name": "f", "arguments": {"a": 1}, oops</tool_call> b': one(text="b"),
    f"<tool_call>{CALL}\n{CALL}</tool_call>": ("", "", [("f", '{"a": 1}')] * 2),
    f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n": (
        "", "", [("f", '{"a": 1}')] * 2,
    ),
    # Cut off: the arguments are a JSON prefix.
    '<tool_call>{"name": "f", "arguments": {"a": [1, "x': one('{"a": [1, "x'),
    # Slips after the arguments began stay arguments.
    '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call> b': one(
        '{"a": oops}}', text="b"
    ),
    '<tool_call>{"name": "f", "arguments": {"a": [1}</tool_call>b': one('{"a": [1}', text="b"),
}  # fmt: skip
NO_CALLS = [
    "<tool_call>not json</tool_call> b",
    "<tool_call></tool_call>",
    "<tool_call>[1]</tool_call>",
    '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": 5}</tool_call>',
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {"a": 1}}</tool_call>',
    '<tool_call>{"arguments": {"a": }, "name": "f"}</tool_call>',
    '<tool_call>{"arguments": {"a": 1], "name": "f"}</tool_call>',
    '<tool_call>{"name": "f", "argum',
    "a <tool_c",
    "<tool_call",
    "<tool_call>\n",
]


@pytest.mark.parametrize("text", HERMES_TEXTS)
def test_hermes(text: str) -> None:
    assert parse(markers(formats.HERMES), text) == HERMES_TEXTS[text]


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_is_text(text: str) -> None:
    assert parse(markers(formats.HERMES), text) == (text, "", [])


def test_llama3() -> None:
    call = '{"name": "f", "parameters": {"a": 1}}'
    new = markers(formats.LLAMA3)
    assert parse(new, call) == one()
    assert parse(new, f" <|python_tag|>{call}") == one()
    assert parse(new, '{"type": "function", "name": "f", "parameters": {"a": 1}}') == one()
    assert parse(new, f"{call}; {call}") == ("", "", [("f", '{"a": 1}')] * 2)
    for text in (f"see {call}", '{"name": "Bob", "parameters": {}}', '{"a": 1}', "{", " {x"):
        assert parse(new, text) == (text, "", [])
    assert parse(new, "<|python_tag|>print(1)")[0] == "<|python_tag|>print(1)"


def test_mistral() -> None:
    new = markers(formats.MISTRAL)
    assert parse(new, f'[TOOL_CALLS] [{CALL[:-1]}, "id": "abcdefghi"}}, {CALL}] ') == (
        "", "", [("f", '{"a": 1}')] * 2,
    )  # fmt: skip
    assert parse(new, f"so [TOOL_CALLS]{CALL}") == one(text="so")
    assert parse(new, 'f[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}') == one(text="f")
    assert parse(new, '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]get_weather[ARGS]{}') == (
        "", "", [("f", '{"a": 1}'), ("get_weather", "{}")],
    )  # fmt: skip
    assert parse(new, '[TOOL_CALLS]other{"a": 1}') == ('[TOOL_CALLS]other{"a": 1}', "", [])
    (begin, _) = MarkerParser(formats.MISTRAL, None, names=NAMES).feed("[TOOL_CALLS]f{")
    assert isinstance(begin, CallBegin)
    assert len(begin.id) == 9 and begin.id.isalnum()


def test_deepseek() -> None:
    form = formats.DEEPSEEK
    begin, call, sep, call_end, end = (
        *form.openers,
        *form.special[:2],
        form.closer,
        form.forced_end,
    )
    new = markers(form)
    calls = f'{call}f{sep}{{"a": 1}}{call_end}'
    assert parse(new, f"so{begin}{calls}{end} x") == one(text="sox")
    assert parse(new, f"{begin}{calls}\n{calls}{end}") == ("", "", one()[2] * 2)
    older = f'{call}function{sep}f\n```json\n{{"a": 1}}\n```{call_end}'
    assert parse(new, f"{begin}{older}{older}{end}") == ("", "", one()[2] * 2)
    broken = f'{begin}{call}f{sep}{{"a": [}}{call_end}{end}'
    assert parse(new, broken) == one('{"a": [}')


def test_reasoning() -> None:
    new = markers(formats.HERMES, THINK)
    opened = markers(formats.HERMES, THINK, in_reasoning=True)
    called = f"<tool_call>\n{CALL}\n</tool_call>"
    assert parse(new, "<think>\nhm\n</think>\n\nyes") == ("yes", "hm", [])
    assert parse(new, " <think></think>yes") == ("yes", "", [])
    assert parse(opened, "hm </thin </think> yes ") == ("yes ", "hm </thin", [])
    assert parse(opened, "never ends </th") == ("", "never ends </th", [])
    assert parse(opened, f"hm {called}</think>{called}") == ("", f"hm {called}", one()[2])
    assert parse(new, "<thinly>") == ("<thinly>", "", [])
    assert parse(new, "no <think>x</think>") == ("no <think>x</think>", "", [])
    assert parse(markers(None, THINK), called) == (called, "", [])


def test_only_one_call_if_only_one_is_wanted() -> None:
    new = markers(formats.HERMES, one_call=True)
    text = f"<tool_call>{CALL}</tool_call>"
    assert parse(new, f"{text}{text} bye") == one()
    parser = new()
    parser.feed(text[:-13])
    assert not parser.done
    parser.feed("}")
    assert parser.done


def test_a_call_is_told_as_it_comes() -> None:
    parser = MarkerParser(formats.HERMES, None, names=NAMES)
    assert parser.feed('<tool_call>\n{"name": "f", "arguments": ') == []
    begin, first = parser.feed('{"a"')
    assert begin == CallBegin(0, begin.id, "f")  # type: ignore[union-attr]
    assert first == CallArguments(0, '{"a"')
    assert parser.feed(": 1") == [CallArguments(0, ": 1")]
    assert parser.feed("}}\n</tool_") == [CallArguments(0, "}")]
    assert parser.feed("call> x") == [Text("x")]


ARGUMENTS = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=12)
        | st.sampled_from(["</tool_call>", "<tool_call>", '"}', "[TOOL_CALLS]", "; {"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=5,
    ),
    max_size=3,
)  # fmt: skip


@pytest.mark.parametrize("family", TEMPLATES)
@settings(deadline=None, max_examples=40)
@given(
    arguments=st.lists(ARGUMENTS, min_size=1, max_size=3),
    said=st.sampled_from(["", "I look it up."]),
    thought=st.sampled_from(["", "Hm.\nIs it <tool_call> or </think ?"]),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_what_a_template_renders_is_read_back(
    family: str, arguments: list[dict[str, Any]], said: str, thought: str, cuts: list[int]
) -> None:
    source = TEMPLATES[family]
    calls = [
        {"id": f"abcdefgh{i}", "type": "function", "function": {"name": "f", "arguments": a}}
        for i, a in enumerate(arguments)
    ]
    if family == "llama3":
        said = ""  # its calls come alone
    think = formats.think_markers(source)
    thought = thought if think else ""
    message = {"role": "assistant", "content": said, "tool_calls": calls}
    message["reasoning_content"] = thought
    text = ChatTemplate(source, {}).render([message], add_generation_prompt=False)
    text = text.removeprefix("<|assistant|>").removesuffix("<|end|>")
    parser = MarkerParser(formats.call_format(source), think, names=NAMES)
    parts: list[Part] = []
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(edges):
        parts += parser.feed(text[start:end])
    found = outcome(parts + parser.finish())
    assert found[:2] == (said, thought)
    assert [json.loads(written) for _, written in found[2]] == arguments


RESPONSES = {
    "just text": ("just text", "", []),
    "<|channel|>thought\nhm <|channel|> yes": ("yes", "hm", []),
    "so\n<call f><n>7</n><s>x</s></call>\n<call f></call>": (
        "so", "", [("f", '{"n": 7, "s": "x"}'), ("f", "{}")],
    ),
    "<call other><n>7</n></call> b": ("<n>7</n>b", "", []),
}  # fmt: skip


def template_parser(prompt: str = "<|assistant|>", spec: Any = RESPONSE_TEMPLATE) -> Any:
    return lambda: TemplateParser(response_template.load(spec), prompt, TOOLS, formats._openai_id)


@pytest.mark.parametrize("text", RESPONSES)
def test_a_response_template(text: str) -> None:
    assert parse(template_parser(), text) == RESPONSES[text]


def test_a_response_template_reads_the_prompt_too() -> None:
    new = template_parser("<|user|>hi<|assistant|><|channel|>thought\n")
    assert new().reasoning
    assert parse(new, "hm<|channel|>yes") == ("yes", "hm", [])


def test_a_response_template_that_fails_leaves_the_text() -> None:
    fields = {"tool_calls": {"open": "<j>", "close": "</j>", "content": "json"}, "content": {}}
    spec = {"start_anchor": "<|assistant|>", "fields": fields}
    parser = template_parser(spec=spec)()
    parts = [*parser.feed("so "), *parser.feed("<j>{no"), *parser.feed("</j>"), *parser.feed("!")]
    assert outcome(parts + parser.finish()) == ("so{no</j>!", "", [])


@pytest.mark.parametrize(
    ("source", "calls"),
    [
        (TEMPLATES["hermes"], formats.HERMES),
        (TEMPLATES["llama3"], formats.LLAMA3),
        (TEMPLATES["mistral"], formats.MISTRAL),
        (TEMPLATES["mistral_args"], formats.MISTRAL_ARGS),
        (formats.DEEPSEEK.openers[0], formats.DEEPSEEK),
        ("<tool_call>\n<function={{ name }}>", None),
        ("{{ messages }}", formats.HERMES),
    ],
)
def test_the_format_is_found_from_the_template(source: str, calls: Any) -> None:
    assert formats.call_format(source) is calls


def test_reasoning_markers_are_found_from_the_template() -> None:
    assert formats.think_markers("{% if x %}</think>{% endif %}") == THINK
    assert formats.think_markers("[THINK][/THINK]") == ("[THINK]", "[/THINK]")
    assert formats.think_markers("think") is None


def test_parts_are_merged() -> None:
    begin = CallBegin(0, "i", "f")
    parts = [Text("a"), Text(""), Text("b"), begin, CallArguments(0, "{"), CallArguments(0, "}")]
    assert merged(parts) == [Text("ab"), begin, CallArguments(0, "{}")]
    assert Turn.of(parts) == Turn("ab", "", [Call("i", "f", "{}")])
