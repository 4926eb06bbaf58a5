"""What a request asks of its text becomes a grammar, or a 400 that names the place."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from typing import Any

import pytest

from app.structured.request import schema_grammar
from batching.core.types import SamplingParams
from batching.worker.grammar import Grammars
from tests.app.conftest import MakeServer, Server
from tests.structured.corpus import EXPLOSIVE

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = "response_format.json_schema.schema"
BOTH = [(CHAT, {"messages": [{"role": "user", "content": "hi"}]}), (COMPLETIONS, {"prompt": "hi"})]


def json_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


async def refused(server: Server, param: str, **fields: Any) -> str:
    for path, prompt in BOTH:
        response = await server.post(path, **prompt, **fields)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param
    assert not server.engine.requests
    message: str = error["message"]
    return message


NESTED: Any = {"type": "integer"}
for _ in range(200):
    NESTED = {"type": "array", "items": NESTED}

FAULTY: list[tuple[Any, str]] = [
    ({"type": "text"}, ".type"),
    ({"type": ["string", "int"]}, ".type"),
    ({"type": []}, ".type"),
    ({"type": 5}, ".type"),
    ({"properties": {"a": {"type": "str"}}}, ".properties.a.type"),
    ({"items": {"anyOf": [{}, {"type": "?"}]}}, ".items.anyOf[1].type"),
    ({"enum": []}, ".enum"),
    ({"enum": "abc"}, ".enum"),
    ({"$ref": "#/$defs/missing"}, ".$ref"),
    ({"properties": {"a": {"$ref": "#/definitions/b/c"}}}, ".properties.a.$ref"),
    ({"$ref": "https://example.com/schema.json"}, ".$ref"),
    ({"$ref": "other.json#/a"}, ".$ref"),
    ({"$ref": 5}, ".$ref"),
    ({"$ref": "#nowhere"}, ""),
    ({"$ref": "#"}, ""),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, ""),
    ({"type": "string", "pattern": "["}, ""),
    ({"type": "string", "pattern": "(?=a)b"}, ""),
    ({"type": "string", "pattern": r"(a)\1"}, ""),
    ({"type": "string", "pattern": 5}, ".pattern"),
    ({"type": "string", "format": "color"}, ".format"),
    ({"type": "string", "minLength": -1}, ".minLength"),
    ({"type": "string", "maxLength": 1.5}, ".maxLength"),
    ({"type": "string", "maxLength": "3"}, ".maxLength"),
    ({"type": "string", "minLength": 10**9}, ".minLength"),
    ({"type": "integer", "minimum": "0"}, ".minimum"),
    ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4}, ""),
    ({"type": "integer", "minimum": 3.2, "maximum": 3.8}, ""),
    ({"type": "number", "exclusiveMinimum": 3, "exclusiveMaximum": 3}, ""),
    ({"type": "number", "minimum": 2.5, "exclusiveMaximum": 2.5}, ""),
    ({"type": "integer", "minimum": 10**30, "maximum": 10**30 + 5}, ".minimum"),
    ({"type": "number", "exclusiveMaximum": -1e300}, ".exclusiveMaximum"),
    ({"type": "integer", "multipleOf": 0}, ".multipleOf"),
    ({"type": "integer", "multipleOf": 999_983}, ".multipleOf"),
    ({"type": "number", "multipleOf": 1e-9}, ".multipleOf"),
    ({"properties": 5}, ".properties"),
    ({"properties": {"a": 5}}, ".properties.a"),
    ({"required": "a"}, ".required"),
    ({"required": [1]}, ".required"),
    ({"anyOf": []}, ".anyOf"),
    ({"allOf": {}}, ".allOf"),
    ({"prefixItems": []}, ".prefixItems"),
    ({"not": {"type": "string"}}, ".not"),
    ({"if": {"type": "string"}, "then": {"const": "a"}}, ".if"),
    ({"type": "array", "items": {}, "uniqueItems": True}, ""),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, ""),
    (NESTED, ""),
    (False, ""),
    ([], ""),
    ("{", ""),
    (7, ""),
]
CONTRADICTORY: list[Any] = [
    {"type": "integer", "minimum": 5, "maximum": 3},
    {"type": "string", "minLength": 5, "maxLength": 3},
    {"type": "string", "pattern": "^a$", "minLength": 5},
    {"type": "array", "minItems": 3, "maxItems": 1},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"type": "string", "enum": [1, 2]},
    {"type": "object", "properties": {"a": False}, "required": ["a"]},
    {"type": "object", "properties": {}, "required": ["a"], "additionalProperties": False},
]


@pytest.mark.parametrize(("schema", "place"), FAULTY, ids=lambda value: str(value)[:60])
async def test_faults_are_named(server: Server, schema: Any, place: str) -> None:
    await refused(server, SCHEMA + place, response_format=json_schema(schema))
    if not isinstance(schema, list | int | bool):
        await refused(server, f"guided_json{place}", guided_json=schema)


@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize(
    ("low", "high"), [(-(2**63), 2**63 - 1), (-(2**60), 2**60), (-(2**53) - 5, 2**53 + 2000)]
)
@pytest.mark.parametrize("exclusive", [False, True])
def test_large_bounds_are_never_passed(kind: str, low: int, high: int, exclusive: bool) -> None:
    names = ("exclusiveMinimum", "exclusiveMaximum") if exclusive else ("minimum", "maximum")
    schema = {"type": kind, names[0]: low, names[1]: high}
    grammars = Grammars(str(resources.files("batching") / "builtin/model"), 3824, (2,))
    params = SamplingParams(100, grammar=schema_grammar(schema, "schema"))

    def allows(number: int) -> bool:
        matcher = grammars.matcher(params).inner
        tokens = grammars.load().tokenize_str(str(number))
        return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())

    assert all(allows(number) for number in (0, 2**52, -(2**52)))
    past = 1 if kind == "integer" else 1024  # a number is what it is in float64
    assert not any(allows(number) for number in (low - past, high + past, low * 10, high * 10))
    if exclusive:
        assert not allows(low) and not allows(high)


@pytest.mark.parametrize("schema", CONTRADICTORY, ids=lambda value: str(value)[:60])
async def test_contradictions_are_refused(server: Server, schema: Any) -> None:
    await refused(server, SCHEMA, response_format=json_schema(schema))
    nested = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    await refused(server, "guided_json", guided_json=nested)


@pytest.mark.parametrize("schema", EXPLOSIVE, ids=lambda value: str(value)[:60])
async def test_explosive_schemas_end(server: Server, schema: Any) -> None:
    """In bounded time (the suite's limit), with an answer or a refusal."""
    server.say("1")
    response = await server.post(COMPLETIONS, prompt="a", guided_json=schema)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert response.json()["error"]["param"].startswith("guided_json")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": json_schema({}, name="")}, "response_format.json_schema.name"),
        ({"response_format": json_schema({}, name="a b")}, "response_format.json_schema.name"),
        ({"response_format": json_schema({}, strict="yes")}, "response_format.json_schema.strict"),
        ({"response_format": json_schema({}, extra=1)}, "response_format.json_schema.extra"),
        ({"response_format": json_schema(None)}, SCHEMA),
        ({"guided_regex": "["}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_regex": "(?=a)"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice[1]"),
        ({"guided_choice": ["a", 1]}, "guided_choice[1]"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_grammar": "start: ["}, "guided_grammar"),
        ({"guided_grammar": 'begin: "a"'}, "guided_grammar"),
        ({"guided_grammar": "root ::= ["}, "guided_grammar"),
        ({"guided_grammar": 'start: %json {"multipleOf": 999983}'}, "guided_grammar"),
        ({"guided_grammar": '{"grammars": []}'}, "guided_grammar"),
        ({"guided_json": "{"}, "guided_json"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": {"type": "x"}}}, "structured_outputs.json.type"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"whitespace_pattern": " "}},
         "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_json": {}, "structured_outputs": {"json": {}}}, "structured_outputs.json"),
        ({"guided_regex": "a", "allowed_token_ids": [5]}, "allowed_token_ids"),
    ],
    ids=str,
)  # fmt: skip
async def test_fields_are_checked(server: Server, fields: Any, param: str) -> None:
    await refused(server, param, **fields)


async def test_large_grammars_are_refused_with_the_limit(make_server: MakeServer) -> None:
    server = make_server(max_grammar_bytes=300)
    message = await refused(server, "guided_choice", guided_choice=["x" * 400])
    assert "300" in message
    await server.ok(COMPLETIONS, prompt="a", guided_choice=["x" * 100])


async def test_a_model_without_an_end_cannot_be_constrained(
    make_server: MakeServer, capabilities: Any
) -> None:
    import msgspec

    server = make_server(caps=msgspec.structs.replace(capabilities, eos_token_ids=()))
    message = await refused(server, "guided_regex", guided_regex="a")
    assert "end token" in message


@pytest.mark.parametrize(("path", "prompt"), BOTH)
async def test_what_reaches_the_engine(server: Server, path: str, prompt: Any) -> None:
    server.say("1")
    await server.ok(path, **prompt, response_format={"type": "text"}, n=2)
    assert all(request.params.grammar is None for request in server.engine.requests)
    schema = {"type": "object", "properties": {"b": {}, "a": {}}, "$schema": "http://x/y"}
    for fields in (
        {"response_format": json_schema(schema, strict=False, description="d")},
        {"guided_json": json.dumps(schema)},
        {"structured_outputs": {"json": schema, "json_object": False}},
    ):
        await server.ok(path, **prompt, **fields)
    first, second, third = (request.params.grammar for request in server.engine.requests[2:])
    assert first is not None and first == second == third
    (grammar,) = json.loads(first.source)["grammars"]
    assert list(grammar["json_schema"]["properties"]) == ["b", "a"]
    assert grammar["json_schema"]["additionalProperties"] is False
    assert not first.to_the_end
    await server.ok(path, **prompt, response_format={"type": "json_object"})
    anything = server.engine.requests[-1].params.grammar
    assert anything is not None and anything.free_keys


async def test_end_tokens_end_even_with_ignore_eos(server: Server) -> None:
    server.say("1")
    await server.ok(COMPLETIONS, prompt="a", guided_regex="1+", ignore_eos=True)
    params = server.engine.requests[0].params
    assert params.stop_token_ids == (0,)
    assert params.grammar is not None and params.grammar.to_the_end


async def test_each_grammar_is_compiled_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.say("1")
    compiler = server.service.grammars
    compiled = []
    original = compiler._fault
    monkeypatch.setattr(compiler, "_fault", lambda g: compiled.append(g) or original(g))
    for pattern in ("a", "b", "a", "[", "[", "a"):
        await server.post(COMPLETIONS, prompt="a", guided_regex=pattern)
    assert [grammar.source for grammar in compiled] == ["start: /a/", "start: /b/", "start: /[/"]


def test_nothing_is_imported_before_the_first_grammar() -> None:
    code = """
import sys
from importlib import resources
import app.application
from batching.core.types import SamplingParams, SequencePlan, SlotInit, StepPlan
from batching.worker.protocol import Capabilities
from batching.worker.simulated import SimulatedWorker
worker = SimulatedWorker(Capabilities("m", "s", 100, 256, 64, 16, 8, 32, "n", "n", "n"))
init = SlotInit(0, "r", [1, 2], 2, SamplingParams(4))
worker.wait(worker.submit(StepPlan(0, (init,), (SequencePlan(0, 0, 2, True, (0,)),))))
assert "llguidance" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
