"""Varied JSON schemas of our own, in compact form: `corpus()` names and yields more than 200.

`EXPLOSIVE` are small to write and large to compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

INT, NUM, STR, BOOL, NULL = (
    {"type": t} for t in ("integer", "number", "string", "boolean", "null")
)


def obj(
    properties: dict[str, Any], required: list[str] | None = None, **more: Any
) -> dict[str, Any]:
    """An object; without `required` every key is."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, **more}


def arr(items: Any, low: int = 0, high: int | None = 3, **more: Any) -> dict[str, Any]:
    limits = {"minItems": low} | ({} if high is None else {"maxItems": high})
    return {"type": "array", "items": items, **limits, **more}


def text(**more: Any) -> dict[str, Any]:
    return {"type": "string", **more}


def nullable(schema: Any) -> dict[str, Any]:
    return {"anyOf": [schema, NULL]}


SCALARS: list[Any] = [
    True, {}, INT, NUM, STR, BOOL, NULL,
    {"type": ["string", "null"]}, {"type": ["integer", "boolean"]}, {"type": ["number", "null"]},
    {"type": ["object", "array"]}, {"type": ["array", "string"], "maxItems": 2, "maxLength": 4},
    *({"const": value} for value in (
        None, True, 0, -7, 2.5, "", "x", 'a"b\\c', "line\nbreak\ttab", "naïve ☃ 😀", [], [1, [2]],
        {}, {"a": {"b": [None]}}, 10**20, 1e-7,
    )),
    *({"enum": values} for values in (
        ["red", "green"], [1, 2, 3], [None, True, "x", 1.5], ["é", "日本", "😀"], ['"', "\\", "/"],
        [[1], {"a": 1}], ["a", "ab", "abc"], ["single"], [0, -1, 10**12], ["", " ", "  "],
        [f"value {i}" for i in range(60)], [True, False], ["null", None], [{"k": "v"}, {"k": "w"}],
    )),
    {"type": "string", "enum": ["a", "bb", "ccc"], "minLength": 2},
    {"type": "integer", "enum": [1, 2, 3, 99], "maximum": 5},
    {"enum": ["a", 1, None], "type": ["string", "null"]},
]  # fmt: skip

NUMBERS: list[Any] = [
    *({"type": "integer", "minimum": low, "maximum": high} for low, high in (
        (0, 9), (-5, 5), (7, 7), (100, 1050), (-1000, -999), (0, 10**15), (-3, 1.5), (0.5, 3.5),
    )),
    {"type": "integer", "exclusiveMinimum": 0}, {"type": "integer", "exclusiveMaximum": -10},
    {"type": "integer", "minimum": 18, "exclusiveMaximum": 21},
    {"type": "integer", "multipleOf": 5},
    {"type": "integer", "multipleOf": 12, "minimum": 30, "maximum": 100},
    {"type": "integer", "minimum": 3, "exclusiveMinimum": True},
    {"type": "number", "minimum": 0, "maximum": 1}, {"type": "number", "exclusiveMinimum": -1.5},
    {"type": "number", "minimum": 0.25, "maximum": 0.75}, {"type": "number", "multipleOf": 0.5},
    {"type": "number", "minimum": -273.15}, {"type": "number", "maximum": 1e6, "minimum": 1e3},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.01},
    {"minimum": 5, "maximum": 6, "type": ["integer", "string"], "maxLength": 2},
]  # fmt: skip

PATTERNS = [
    "^[a-z]{2,5}$", "^[A-Z]{3}-[0-9]{4}$", "^(foo|bar|baz)$", "^a*b+c?$", "[ab]", "^x", "[x-z]$",
    r"^\d{3}\.\d{2}$", r"^\w+\s\w+$", r"^é+$", "^[äöü]{1,3}ß$", "^日本[0-9]$", '^"quoted"$',
    r"^\\path\\[a-z]+$", r"^[^a-z]{4}$", r"^\+?[0-9]{5,8}$", r"^#[0-9a-fA-F]{6}$", "^😀{2}$",
    r"^[\w.]{1,8}@[a-z]{1,5}\.(com|org)$", r"^(?:[01]\d|2[0-3]):[0-5]\d$", r"^\/a\/b$", "^$",
    r"^[\u4e00-\u4e05]{2}$", r"^\S{3}$", r"^[a-m]|[n-z]$", r"^(a(b(c)?)?)$", "^.{3}$", r"^[-+*/]$",
]  # fmt: skip
FORMATS = (
    "date", "time", "date-time", "duration", "uuid", "uuid4", "email", "hostname", "ipv4", "ipv6",
)  # fmt: skip

STRINGS: list[Any] = [
    *(text(pattern=pattern) for pattern in PATTERNS),
    *(text(format=name) for name in FORMATS),
    text(format="date", pattern="^20"), text(format="uuid", pattern="^0"), text(format="password"),
    text(maxLength=0), text(minLength=1, maxLength=1), text(minLength=5, maxLength=8),
    text(minLength=40), text(maxLength=3), text(minLength=3, maxLength=5, pattern="^a+$"),
    text(pattern="^[a-z]+$", maxLength=4), text(pattern="b", maxLength=3),
    text(minLength=2, maxLength=2, enum=["ab", "abc", "x"]),
]  # fmt: skip

ARRAYS: list[Any] = [
    {"type": "array"}, arr(INT), arr(STR, 1, 2), arr(BOOL, 4, 4), arr(NULL, 0, 0),
    arr(NUM, 2, None),
    arr(arr(INT, 1, 2), 1, 2), arr(obj({"a": INT}), 1, 2), arr({"enum": ["x", "y"]}, 3, 5),
    arr(nullable(INT)), arr({"type": ["integer", "string"], "maxLength": 3}), arr(True, 1, 2),
    {"type": "array", "prefixItems": [INT, text(maxLength=3)], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": "é"}], "items": BOOL, "minItems": 2,
     "maxItems": 4},
    {"type": "array", "prefixItems": [NULL, BOOL], "items": False},
    {"type": "array", "prefixItems": [INT], "minItems": 1, "maxItems": 1},
    {"type": "array", "items": [INT, BOOL], "additionalItems": False, "minItems": 2,
     "$schema": "http://json-schema.org/draft-07/schema#"},
    {"type": "array", "items": [INT], "additionalItems": NULL, "maxItems": 3,
     "$schema": "http://json-schema.org/draft-07/schema#"},
    arr({"enum": ["a", "b", "c"]}, 0, 3, uniqueItems=True),
    arr({"enum": [1, 2, 3, 4]}, 2, 3, uniqueItems=True), arr(BOOL, 1, 2, uniqueItems=True),
    arr(INT, 0, 1, uniqueItems=True), arr(INT, 0, 3, contains={"const": 7}),
    {"type": "array", "contains": {"const": "x"}, "minContains": 2, "maxItems": 3},
    arr(INT, 0, 4, contains={"minimum": 5, "type": "integer"}, minContains=2),
    arr(INT, 0, 2, contains={"const": 7}, minContains=0),
]  # fmt: skip

OBJECTS: list[Any] = [
    {"type": "object"}, obj({}), obj({"a": INT}), obj({"a": INT, "b": STR}, ["b"]),
    obj({"z": BOOL, "a": NULL, "m": INT}), obj({"a": INT, "b": INT, "c": INT}, []),
    obj({"a": BOOL}, ["a"], additionalProperties=False), obj({"a": BOOL}, additionalProperties=INT),
    obj({"a": BOOL}, ["a", "other"]), {"type": "object", "required": ["x", "y"]},
    {"type": "object", "additionalProperties": text(maxLength=3), "maxProperties": 2},
    {"type": "object", "additionalProperties": INT, "minProperties": 2, "maxProperties": 3},
    {"type": "object", "additionalProperties": False},
    obj({"a": INT, "b": INT}, additionalProperties=False, minProperties=2),
    obj({"é": INT, "日本": BOOL, "😀": NULL}),
    obj({'q"uote': INT, "back\\slash": INT, "new\nline": BOOL}),
    obj({"": INT, " ": BOOL}), obj({"a/b": INT, "c~d": INT, "e.f": BOOL, "$g": NULL}),
    obj({"a": obj({"b": obj({"c": obj({"d": INT})})})}),
    obj({f"k{i:02}": {"enum": [i, str(i)]} for i in range(40)}),
    obj({f"k{i}": BOOL for i in range(30)}, [f"k{i}" for i in range(0, 30, 3)]),
    {"type": "object", "patternProperties": {"^x-": INT}, "additionalProperties": False,
     "minProperties": 1, "maxProperties": 2},
    {"type": "object", "properties": {"id": INT}, "required": ["id"],
     "patternProperties": {"^[a-z]{3,9}$": BOOL}, "additionalProperties": False},
    {"type": "object", "propertyNames": {"enum": ["en", "de"]}, "additionalProperties": STR},
    {"type": "object", "propertyNames": {"pattern": "^[a-z]{2,9}$"}, "additionalProperties": INT,
     "maxProperties": 2},
    {"type": "object", "propertyNames": {"maxLength": 3, "minLength": 2}, "maxProperties": 1,
     "additionalProperties": NULL},
    obj({"card": INT, "address": BOOL}, [], dependentRequired={"card": ["address"]}),
    obj({"a": INT, "b": BOOL}, [], dependencies={"a": ["b"]}),
    obj({"a": nullable(INT), "b": {"type": ["string", "null"], "maxLength": 2}}),
    obj({"a": {"type": "integer", "default": 3, "title": "A", "description": "d"}}, []),
    obj({"list": arr(obj({"id": INT, "tags": arr({"enum": ["x", "y"]})}), 1, 3)}),
    obj({"a": False, "b": INT}, ["b"]), obj({"a": True, "b": {}}, ["b"]),
]  # fmt: skip

NODE = obj({"value": INT, "next": nullable({"$ref": "#/$defs/node"})})
TREE = obj({"name": text(maxLength=4), "children": arr({"$ref": "#"}, 0, 2)})
EXPRESSION = {
    "oneOf": [
        {"type": "integer"},
        obj(
            {
                "op": {"enum": ["+", "-"]},
                "left": {"$ref": "#/$defs/e"},
                "right": {"$ref": "#/$defs/e"},
            }
        ),
    ]
}
REFERENCES: list[Any] = [
    {"$defs": {"node": NODE}, "$ref": "#/$defs/node"}, TREE,
    {"$defs": {"e": EXPRESSION}, "$ref": "#/$defs/e"},
    {"definitions": {"p": text(maxLength=3)}, **obj({"a": {"$ref": "#/definitions/p"}})},
    {"$defs": {"a/b": INT, "c~d": BOOL, "é %": NULL}, **obj({
        "a": {"$ref": "#/$defs/a~1b"}, "c": {"$ref": "#/$defs/c~0d"},
        "e": {"$ref": "#/$defs/é%20%25"},
    })},
    obj({"a": text(maxLength=2), "b": {"$ref": "#/properties/a"}}),
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": INT},
     "$ref": "#/$defs/a"},
    {"$defs": {"x": obj({"y": {"$ref": "#/$defs/y"}}, []),
               "y": obj({"x": {"$ref": "#/$defs/x"}}, [])}, "$ref": "#/$defs/x"},
    obj({"a": {"$ref": "#/$defs/n", "description": "with a sibling"}}, **{"$defs": {"n": INT}}),
    obj({"a": {"allOf": [{"$ref": "#/$defs/n"}], "title": "wrapped"}}, **{"$defs": {"n": NODE | {
        "properties": {"value": INT}, "required": ["value"]}}}),
    {"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "maximum": 9, "minimum": 0},
    {"$defs": {"json": {"anyOf": [NULL, BOOL, INT, arr({"$ref": "#/$defs/json"})]}},
     "$ref": "#/$defs/json"},
    {"components": {"schemas": {"P": obj({"id": INT})}}, "$ref": "#/components/schemas/P"},
]  # fmt: skip

CAT, DOG = (obj({"kind": {"const": k}, k: INT}) for k in ("cat", "dog"))
COMBINATIONS: list[Any] = [
    {"anyOf": [INT, text(maxLength=3)]}, {"anyOf": [obj({"a": INT}), obj({"b": STR})]},
    {"anyOf": [arr(INT), obj({"a": INT})]}, {"anyOf": [CAT, DOG]}, {"oneOf": [CAT, DOG]},
    {"oneOf": [INT, STR]}, {"oneOf": [{"const": 1}, {"const": "1"}, NULL]},
    {"oneOf": [obj({"a": INT}), obj({"b": INT})]},
    {"oneOf": [obj({"a": INT, "b": BOOL}, ["a"]), obj({"c": NULL})]},
    {"oneOf": [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 5}]},
    {"oneOf": [obj({"t": {"enum": ["x", "y"]}, "v": INT}), obj({"t": {"enum": ["z"]}, "v": STR})]},
    {"$defs": {"c": CAT, "d": DOG}, "oneOf": [{"$ref": "#/$defs/c"}, {"$ref": "#/$defs/d"}],
     "discriminator": {"propertyName": "kind"}},
    {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 8}]},
    {"allOf": [obj({"a": INT}), obj({"b": BOOL})]},
    {"allOf": [{"$ref": "#/$defs/base"}, obj({"extra": BOOL})],
     "$defs": {"base": obj({"id": INT})}},
    {"allOf": [text(minLength=2), text(maxLength=4)]},
    {"allOf": [{"$ref": "#/$defs/base"}], "properties": {"more": NULL}, "required": ["more"],
     "$defs": {"base": obj({"id": INT})}},
    {"allOf": [{"required": ["a"]}, {"properties": {"a": INT}}], "type": "object"},
    {"allOf": [{"anyOf": [INT, STR]}, {"anyOf": [{"maximum": 4, "type": "integer"}, NULL]}]},
    {"type": "object", "properties": {"a": INT, "b": INT}, "anyOf": [
        {"required": ["a"]}, {"required": ["b"]}]},
    obj({"id": INT}, anyOf=[obj({"x": BOOL}), obj({"y": NULL})]),
    obj({"pet": {"oneOf": [CAT, DOG]}, "others": arr({"anyOf": [CAT, DOG]}, 1, 2)}),
    {"anyOf": [False, INT]}, {"anyOf": [{"enum": [1, 2]}, {"enum": ["a"]}, {"const": None}]},
    nullable(nullable(INT)), {"allOf": [{}, True, INT]},
    {"anyOf": [text(pattern="^a{2}$"), text(pattern="^b{3}$")]},
    {"anyOf": [text(format="date"), text(format="uuid"), NULL]},
]  # fmt: skip

REAL: list[Any] = [
    obj({"location": text(maxLength=12), "unit": {"enum": ["celsius", "fahrenheit"]}}),
    obj({"steps": arr(obj({"explanation": text(maxLength=9), "output": text(maxLength=9)}), 1, 2),
         "final_answer": text(maxLength=9)}),
    obj({"sentiment": {"enum": ["positive", "neutral", "negative"]},
         "confidence": {"type": "number", "minimum": 0, "maximum": 1}}),
    obj({"invoice": text(pattern="^INV-[0-9]{6}$"), "date": text(format="date"),
         "lines": arr(obj({"sku": text(pattern="^[A-Z]{3}$"), "count": {"type": "integer",
            "minimum": 1, "maximum": 99}, "price": {"type": "number", "minimum": 0}}), 1, 3),
         "paid": BOOL}),
    obj({"id": text(format="uuid"), "created_at": text(format="date-time"),
         "email": text(format="email"), "roles": arr({"enum": ["admin", "user"]}, 1, 2)}),
    obj({"type": {"const": "Feature"}, "geometry": {"oneOf": [
        obj({"type": {"const": "Point"}, "coordinates": arr(NUM, 2, 2)}),
        obj({"type": {"const": "LineString"}, "coordinates": arr(arr(NUM, 2, 2), 2, 3)})]}}),
    obj({"tool": {"enum": ["search", "calculator"]}, "arguments": {"anyOf": [
        obj({"query": text(maxLength=8)}), obj({"expression": text(maxLength=8)})]}}),
    obj({"thought": text(maxLength=20),
         "action": nullable(obj({"name": {"enum": ["go", "stop"]}}))}),
    obj({"question": text(maxLength=10), "options": arr(text(maxLength=5), 4, 4), "answer": {
        "type": "integer", "minimum": 0, "maximum": 3}}),
    obj({"entities": arr(obj({"text": text(maxLength=6), "label": {"enum": ["PER", "LOC"]},
         "span": {"type": "array", "prefixItems": [INT, INT], "items": False, "minItems": 2}}),
         0, 2)}),
    obj({"ip": text(format="ipv4"), "port": {"type": "integer", "minimum": 1, "maximum": 65535},
         "host": text(format="hostname")}),
    obj({"matrix": arr(arr({"type": "integer", "minimum": 0, "maximum": 1}, 3, 3), 3, 3)}),
    obj({"recipe": obj({"title": text(maxLength=8), "minutes": INT, "ingredients": arr(obj({
        "name": text(maxLength=6), "grams": {"type": "integer", "minimum": 1, "maximum": 500}}),
        1, 3)})}),
    obj({"settings": {"type": "object", "additionalProperties": BOOL, "maxProperties": 3}}),
]  # fmt: skip

FAMILIES = {
    "scalar": SCALARS,
    "number": NUMBERS,
    "string": STRINGS,
    "array": ARRAYS,
    "object": OBJECTS,
    "reference": REFERENCES,
    "combination": COMBINATIONS,
    "real": REAL,
}


def corpus() -> Iterator[tuple[str, Any]]:
    """(name, schema); some families also as the value of a key, and as items."""
    for family, schemas in FAMILIES.items():
        for i, schema in enumerate(schemas):
            yield f"{family}-{i}", schema
    for family in ("number", "string"):
        for i, schema in enumerate(FAMILIES[family]):
            if i % 2:
                yield f"{family}-{i}-in-object", obj({"before": BOOL, "value": schema})
            else:
                yield f"{family}-{i}-in-array", arr(schema, 1, 2)


def doubled(depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}}
    return schema


def all_of_any(count: int) -> Any:
    keys = [f"k{i}" for i in range(count)]
    options = [
        [{"type": "object", "properties": {k: {"const": j}}, "required": [k]} for j in range(4)]
        for k in keys
    ]
    return {"allOf": [{"anyOf": some} for some in options]}


EXPLOSIVE: list[Any] = [
    doubled(9), doubled(14), all_of_any(3), all_of_any(6), all_of_any(12),
    {"type": "string", "pattern": "^(a|aa|aaa)+b{200}{200}$"},
    {"type": "string", "pattern": "^((a{0,100}){0,100}){0,100}$"},
    {"type": "string", "pattern": "(x+x+)+y" * 20},
    {"type": "string", "pattern": ".*a.{500}"},
    {"allOf": [{"type": "string", "pattern": f"[a-z]{{{i}}}[0-9]"} for i in range(1, 20)]},
    {"type": "string", "minLength": 100_000, "maxLength": 10**12},
    {"type": "array", "items": {"type": "integer"}, "minItems": 100_000},
    {"enum": list(range(15_000))},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
    {"type": "object", "minProperties": 30, "properties": {f"p{i}": {} for i in range(60)}},
    {"type": "integer", "multipleOf": 999, "minimum": 10**15, "maximum": 10**18},
    {"type": "array", "items": {"enum": list(range(40))}, "uniqueItems": True},
    {"$defs": {"a": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}},
                     "required": ["x"]}}, "$ref": "#/$defs/a"},
]  # fmt: skip
