"""What a request asks of its text (`response_format`, `guided_…`), as a grammar."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

from app.http.errors import ApiError
from app.schemas.common import GenerationFields, StructuredOutputs
from app.structured.expressions import translate
from app.structured.free_values import free_values
from app.structured.schema import has_free_keys, prepare_schema
from batching.core.types import Grammar

_JSON_OBJECT = {"type": "object"}


class RequestedGrammar(NamedTuple):
    """A grammar, and the field to name when it cannot be used."""

    grammar: Grammar
    param: str


def requested_grammar(fields: GenerationFields) -> RequestedGrammar | None:
    """The grammar that a request asks for. Not compiled yet.

    Raises `ApiError` for more than one, and for what is no schema, expression or grammar at all.
    """
    asked = _asked(fields)
    if not asked:
        return None
    if len(asked) > 1:
        first, second = list(asked)[:2]
        raise _bad(second, f"cannot be combined with {first}: ask for one structure")
    ((param, (kind, value)),) = asked.items()
    if fields.allowed_token_ids is not None:
        raise _bad("allowed_token_ids", f"cannot be combined with {param}")
    grammar = _GRAMMARS[kind](value, param)
    if fields.ignore_eos:
        grammar = msgspec.structs.replace(grammar, to_the_end=True)
    return RequestedGrammar(grammar, param)


def schema_grammar(schema: Any, param: str) -> Grammar:
    """The grammar of a JSON schema's values. Raises `ApiError` naming the place in `param`."""
    prepared = prepare_schema(schema, param)
    source = _encode({"grammars": [{"json_schema": prepared}]})
    free_keys = has_free_keys(prepared)
    values = None if free_keys else free_values(prepared)
    return Grammar(source, free_keys=free_keys, has_json=True, free_values=values)


def _asked(fields: GenerationFields) -> dict[str, tuple[str, Any]]:
    """Field to kind and value, of all fields that ask for a structure."""
    asked: dict[str, tuple[str, Any]] = {}
    response = fields.response_format
    if response is not None and response.type == "json_object":
        asked["response_format"] = ("json_object", True)
    elif response is not None and response.type == "json_schema":
        if response.json_schema is None:
            raise _bad("response_format.json_schema", "missing", "missing_parameter")
        schema = response.json_schema.schema
        asked["response_format.json_schema.schema"] = ("json", schema)
    for kind in ("json", "regex", "choice", "grammar"):
        value = getattr(fields, f"guided_{kind}")
        if value is not None:
            asked[f"guided_{kind}"] = (kind, value)
    for kind, value in _structured_outputs(fields.structured_outputs):
        asked[f"structured_outputs.{kind}"] = (kind, value)
    return asked


def _structured_outputs(outputs: StructuredOutputs | None) -> list[tuple[str, Any]]:
    if outputs is None:
        return []
    values = [(name, getattr(outputs, name)) for name in outputs.__struct_fields__]
    values = [(name, value) for name, value in values if value is not None]
    if not values:
        names = ", ".join(outputs.__struct_fields__)
        raise _bad("structured_outputs", f"expected one of {names}")
    return [item for item in values if item != ("json_object", False)]


def _json_object(value: Any, param: str) -> Grammar:
    return schema_grammar(_JSON_OBJECT, param)


def _json(value: Any, param: str) -> Grammar:
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (ValueError, RecursionError) as error:
            raise _bad(param, f"not valid JSON: {error}") from None
    return schema_grammar(value, param)


def _regex(value: str, param: str) -> Grammar:
    escaped = re.sub(r"(?s)\\.|/", _escaped, translate(value)).replace("\n", r"\n")
    return Grammar(f"start: /{escaped}/")


def _escaped(match: re.Match[str]) -> str:
    return r"\/" if match[0] == "/" else match[0]


def _choice(value: list[str], param: str) -> Grammar:
    return Grammar("start: " + " | ".join(map(_encode, value)))


def _grammar(value: str, param: str) -> Grammar:
    if "%json" in value or value.lstrip().startswith("{"):  # their schemas would not be checked
        raise _bad(param, "JSON schemas within a grammar are not supported; use guided_json")
    if "::=" not in value:
        return Grammar(value)
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return Grammar(str(gbnf_to_lark(value)))
    except Exception as error:  # whatever the converter stumbles on is in the grammar
        raise _bad(param, f"not valid GBNF: {error}") from None


_GRAMMARS = {
    "json_object": _json_object,
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}


def _encode(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _bad(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(f"{param}: {message}", param=param, code=code)
