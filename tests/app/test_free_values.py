"""Which values of a schema may be anything, so that what follows does not depend on them."""

from __future__ import annotations

from typing import Any

import pytest

from app.structured.request import schema_grammar

STRING, ONE = {"type": "string"}, {"type": "object", "properties": {"a": {"type": "string"}}}


def named(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        (named(a=STRING, b={"type": ["integer", "null"], "title": "B"}), ("a", "b")),
        (named(a={"type": "array", "items": STRING, "maxItems": 3}), ("a",)),
        (named(a={"anyOf": [{"type": "number"}, {"type": "null"}]}), ("a",)),
        (named(a={"type": "array", "items": {"type": "integer"}}), ()),
        (named(a={"type": "array", "items": True}), None),
        (named(a={"type": "string", "maxLength": 5}), ()),
        (named(a={"type": "string", "pattern": "x"}), ()),
        (named(a={"type": "integer", "minimum": 0}), ()),
        (named(a={"enum": ["x", "y"]}, b=STRING), ("b",)),
        (named(a={"const": "x"}), ()),
        (named(a={}), None),
        ({"anyOf": [named(a=STRING), named(a={"const": "x"}, b=STRING)]}, ("b",)),
        ({"anyOf": [ONE, {"const": {"a": "x"}}]}, None),
        ({"anyOf": [ONE, {"enum": [[{"a": "x"}]]}]}, None),
        ({**ONE, "additionalProperties": {"maxLength": 1}}, None),
        ({**ONE, "patternProperties": {"^b": STRING}}, None),
        ({"$defs": {"b": named(a={"type": "string", "minLength": 2})}, **ONE}, ()),
        ({"allOf": [ONE, named(a={"type": "string", "minLength": 2})]}, None),
        (STRING, ()),
    ],
    ids=str,
)  # fmt: skip
def test_free_values(schema: Any, names: tuple[str, ...] | None) -> None:
    assert schema_grammar(schema, "schema").free_values == names
