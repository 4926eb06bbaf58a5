"""Calls that are demanded are made, and are valid, whatever a model with random weights says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState

from tests.e2e.server_process import ServerProcess
from tests.structured.validity import unique
from tests.worker import tiny_models
from tests.worker.tiny_tokenizer import PIECES, save_tokenizer

MARKERS = ("<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
CLOSE_THINK = len(PIECES) + MARKERS.index("</think>")
FRAME = (
    "{%% for t in tools or [] %%}{{ t.function.name }} {%% endfor %%}"
    "{%% for m in messages %%}{{ m.content }}%s{%% endfor %%}"
)
TEMPLATES = {
    "hermes": FRAME % "</think>" + "{% if enable_thinking %}<think>\n{% endif %}",
    "llama3": FRAME % "<|python_tag|>",
    "mistral": FRAME % "[TOOL_CALLS][ARGS]",
}
USER = {"role": "user", "content": "hi"}


def tool(name: str, inner: dict[str, Any], **more: Any) -> dict[str, Any]:
    """All tools have a definition of the same name, each its own."""
    parameters = {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/inner"}, "y": {"$ref": "#/$defs/inner"}},
        "required": ["x"],
        "additionalProperties": False,
        "$defs": {"inner": inner},
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [
    tool("count", {"type": "integer", "minimum": 0, "maximum": 99}),
    tool("say", {"type": "string", "maxLength": 5}),
    tool("pick", {"type": "array", "items": {"enum": ["a", 1, None]}, "maxItems": 3}),
    {"type": "function", "function": {"name": "ping"}},
]
SCHEMAS = {
    t["function"]["name"]: t["function"].get("parameters", {"maxProperties": 0}) for t in TOOLS
}
HOSTILE = {str(PIECES.index(c)): bias for c, bias in (("{", -100), ("<", -100), ("z", 100))}
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 2, "seed": 1},
    {"temperature": 1, "seed": 2, "logit_bias": HOSTILE, "frequency_penalty": 2},
]


@pytest.fixture(scope="module", params=TEMPLATES)
def api(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a random model with one of the templates; its name is the template's."""
    folder = tmp_path_factory.mktemp("models") / "random"
    # Of a shape that starts without transformers, and that the C++ decoder computes.
    tiny_models.save("mistral_wide", folder, max_position_embeddings=2048, sliding_window=None)
    save_tokenizer(folder, MARKERS)
    config = {"chat_template": TEMPLATES[request.param], "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    name = ("--dtype", "float32", "--served-model-name", request.param)
    process = ServerProcess(folder.parent / "log", str(folder), *name)
    try:
        process.wait_ready()
        yield openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0)
        process.wait_idle()
    finally:
        process.stop()


def ask(api: openai.OpenAI, **fields: Any) -> Any:
    """The choice, which is the same plain and streamed (but for the ids)."""
    model = api.models.list().data[0].id
    fields = {"model": model, "messages": [USER], "max_tokens": 1200, **fields}
    choice = api.chat.completions.create(**fields).choices[0]
    state = ChatCompletionStreamState()
    for chunk in api.chat.completions.create(**fields, stream=True):
        state.handle_chunk(chunk)
    again = state.current_completion_snapshot.choices[0]
    assert (choice.message.content or "") == (again.message.content or "")
    assert calls(choice) == calls(again)
    assert choice.finish_reason == again.finish_reason
    return choice


def calls(choice: Any) -> list[tuple[str, str]]:
    return [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]


def check(choice: Any) -> list[str]:
    """Names of a choice's calls, all of which are valid."""
    assert choice.message.content is None
    for name, arguments in calls(choice):
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == len(ids)
    return [name for name, _ in calls(choice)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "hostile"])
def test_required(api: openai.OpenAI, sampling: dict[str, Any]) -> None:
    choice = ask(api, tools=TOOLS, tool_choice="required", **sampling)
    assert choice.finish_reason == "tool_calls"
    assert 1 <= len(check(choice)) <= 16
    one = ask(api, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, **sampling)
    assert one.finish_reason == "tool_calls"
    assert len(check(one)) == 1


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "hostile"])
def test_named(api: openai.OpenAI, sampling: dict[str, Any]) -> None:
    for name in SCHEMAS:
        choice = {"type": "function", "function": {"name": name}}
        got = ask(api, tools=TOOLS, tool_choice=choice, **sampling)
        assert check(got) == [name]
        assert got.finish_reason == "stop"


FEW_KEYS = {
    "type": "object",
    "propertyNames": {"maxLength": 1},
    "additionalProperties": {"enum": [1]},
    "minProperties": 5,
    "maxProperties": 5,
}
# The model likes escapes, few letters, and to come to an end.
ESCAPES = {str(PIECES.index(c)): 40.0 - 2 * i for i, c in enumerate('\\u061a":')}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 2, "seed": 1}])
def test_no_key_comes_twice_however_it_is_spelled(
    api: openai.OpenAI, sampling: dict[str, Any]
) -> None:
    free = {"type": "function", "function": {"name": "free", "parameters": FEW_KEYS}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": FEW_KEYS}}
    fields = {"logit_bias": ESCAPES, **sampling}
    several = ask(api, tools=[free], tool_choice="required", parallel_tool_calls=False, **fields)
    written = [arguments for _, arguments in calls(several)]
    written.append(ask(api, response_format=form, **fields).message.content)
    for text in written:
        keys = json.loads(text, object_pairs_hook=unique)
        jsonschema.validate(keys, FEW_KEYS)
    assert any("\\u" in text for text in written)


def test_allowed_tools(api: openai.OpenAI) -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "ping"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    got = ask(api, tools=TOOLS, tool_choice=choice, temperature=1, seed=4)
    assert set(check(got)) == {"ping"}


def test_a_cut_call_is_a_prefix(api: openai.OpenAI) -> None:
    fields = {"tools": [TOOLS[1]], "tool_choice": "required", "temperature": 0}
    whole = ask(api, **fields, parallel_tool_calls=False)
    ((_, arguments),) = calls(whole)
    for tokens in range(1, 200, 9):
        cut = ask(api, **fields, parallel_tool_calls=False, max_tokens=tokens)
        for _, written in calls(cut):
            assert arguments.startswith(written)
        if cut.finish_reason != "length":
            break
        assert not cut.message.content
    assert cut.finish_reason == "tool_calls"


def test_an_answer_in_a_form_or_calls(api: openai.OpenAI) -> None:
    """With a response format tools may be called instead, in a form as strict."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for seed in range(4):
        got = ask(api, tools=TOOLS, response_format=form, temperature=2, seed=seed)
        if got.message.tool_calls:
            check(got)
        else:
            jsonschema.validate(json.loads(got.message.content), schema)


def test_strict_tools_need_no_force(api: openai.OpenAI) -> None:
    """What looks like a call is one, and a valid one. Random models make none by themselves."""
    model = api.models.list().data[0].id
    strict = [{**t, "function": {**t["function"], "strict": True}} for t in TOOLS]
    bias = {str(PIECES.index(c)): 5.0 for c in '{"name:'}
    if model == "mistral":
        bias[str(len(PIECES) + MARKERS.index("[TOOL_CALLS]"))] = 100.0
    got = ask(api, tools=strict, temperature=1, seed=3, logit_bias=bias, max_tokens=400)
    if model == "mistral":
        assert calls(got)
    for name, arguments in calls(got)[: None if got.finish_reason == "tool_calls" else -1]:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


def test_bad_parameters_are_named(api: openai.OpenAI) -> None:
    bad = tool("bad", {"type": "no such type"})
    model = api.models.list().data[0].id
    for fields in ({"tool_choice": "required"}, {"response_format": {"type": "json_object"}}):
        with pytest.raises(openai.BadRequestError) as error:
            api.chat.completions.create(
                model=model, messages=[USER], tools=[TOOLS[0], bad], **fields
            )
        assert (error.value.param or "").startswith("tools[1].function.parameters")


@pytest.mark.parametrize("api", ["hermes"], indirect=True)
def test_thinking_comes_first(api: openai.OpenAI) -> None:
    """The bias ends the thinking, and nothing after it."""
    thinking: dict[str, Any] = {
        "extra_body": {"chat_template_kwargs": {"enable_thinking": True}},
        "temperature": 1,
        "seed": 5,
    }
    end = {str(CLOSE_THINK): 100}
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", **thinking}
    check(ask(api, **fields, logit_bias=end))
    form = {"type": "json_object"}
    got = ask(api, response_format=form, **thinking, logit_bias=end, max_tokens=100)
    assert got.message.content.startswith("{")
    for more in (fields, {"response_format": form, **thinking}):
        got = ask(api, **more, logit_bias={str(CLOSE_THINK): -100}, max_tokens=30)
        assert got.finish_reason == "length"
        assert got.message.content is None and not got.message.tool_calls
        assert got.message.reasoning == got.message.reasoning_content != ""
