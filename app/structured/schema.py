"""JSON schemas: checked, and put into the form that llguidance reads.

What a schema's grammar lets through is always valid, but not all that is valid is let through:

- Keys come in the schema's order, and objects with `properties` have no others unless
  `additionalProperties` asks for them (as OpenAI's strict mode and vLLM have it).
- White space is at most one space after a comma or colon, so that no model can write it for ever.

A keyword that cannot be kept is refused by name; unknown ones are annotations, as the standard has
it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import quote, unquote

from app.http.errors import ApiError
from app.structured import formats
from app.structured.expressions import translate
from app.structured.rewrites import (
    close,
    contains,
    dependent_required,
    exclusive_alternatives,
    merge_all_of,
    old_keywords,
    open_interval,
    property_names,
    unique_items,
)

MAX_DEPTH = 100
# llguidance builds an automaton with as many states, in time that grows with their square.
_MAX_DIVISOR = 1000
_MAX_DECIMALS = 6
# llguidance takes bounds for float64, and as int64: they must be the same in both.
_EXACT = 2**53
_FLOAT_STEP = 1024  # of float64 just below 2**63
_LARGEST = 2**63 - _FLOAT_STEP
# No text is so long; regular expressions cannot count so far.
_ENDLESS = 10_000_000
_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_UNSUPPORTED = (
    "$dynamicRef", "$recursiveRef", "not", "if", "then", "else", "dependentSchemas",
    "dependencies", "unevaluatedItems", "maxContains", "contentSchema",
)  # fmt: skip
_COUNTS = (
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties",
    "minContains",
)  # fmt: skip
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_ALTERNATIVES = ("anyOf", "oneOf", "allOf")
_SEPARATORS = {"item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": False}

Schema = dict[str, Any]


class _Fault(Exception):
    """What is wrong, and where in the schema."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


def prepare_schema(schema: Any, param: str) -> Schema:
    """The schema for llguidance, alone or nested in Lark by `%json`.

    Raises `ApiError` naming the place below `param`.
    """
    try:
        return _Preparation(schema).result
    except _Fault as fault:
        path = f"{param}{fault.path}"
        raise ApiError(f"{path}: {fault}", param=path, code="invalid_value") from None


class _Preparation:
    """Visits every subschema once and changes it in place."""

    def __init__(self, schema: Any) -> None:
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise _Fault("", "a schema must be an object that allows something")
        self.result: Schema = copy.deepcopy(schema)
        self._seen: dict[int, Schema] = {}
        self._open: set[int] = set()  # parts of a whole: another part may have the other keys
        self.result.pop("$schema", None)
        self._visit(self.result, "", 0)
        for node in list(self._seen.values()):
            if id(node) not in self._open and (refusal := close(node)) is not None:
                raise _Fault("", refusal)
        self.result["x-guidance"] = dict(_SEPARATORS)

    def _visit(self, node: Any, path: str, depth: int) -> None:
        if isinstance(node, bool):
            return
        if not isinstance(node, dict):
            raise _Fault(path, "a schema must be an object or a boolean")
        if depth > MAX_DEPTH:
            raise _Fault("", f"the schema is nested more than {MAX_DEPTH} deep")
        if id(node) in self._seen:
            return
        self._seen[id(node)] = node
        node.pop("x-guidance", None)
        old_keywords(node)
        _check(node, path)
        self._reference(node, path, depth)
        for child, name in _children(node, path):
            self._visit(child, f"{path}{name}", depth + 1)
        self._rewrite(node, path)

    def _reference(self, node: Schema, path: str, depth: int) -> None:
        reference = node.get("$ref")
        if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
            self._visit(self.resolve(node, path), path, depth + 1)
            node["$ref"] = "#" + quote(unquote(reference[1:]), safe="/~")
        elif reference is not None and not (
            isinstance(reference, str) and reference.startswith("#")
        ):
            raise _Fault(f"{path}.$ref", "only references within the schema (#…) are followed")

    def resolve(self, node: Schema, path: str) -> Any:
        """What the node's `$ref`, a JSON pointer, points to."""
        target: Any = self.result
        pointer = unquote(node["$ref"])[1:]
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(part)] if isinstance(target, list) else target[part]
            except (LookupError, ValueError, TypeError):
                raise _Fault(f"{path}.$ref", f"{node['$ref']} points to nothing") from None
        return target

    def _rewrite(self, node: Schema, path: str) -> None:
        """Express by what llguidance knows what it does not, or refuse it."""
        steps: list[Callable[[Schema], str | None]] = [
            contains, dependent_required, property_names, unique_items, open_interval,
        ]  # fmt: skip
        for step in steps:
            if (refusal := step(node)) is not None:
                raise _Fault(path, refusal)
        merge_all_of(node, lambda part: self._target(part, path))
        exclusive_alternatives(node, lambda part: self._target(part, path))
        parts = [part for name in _ALTERNATIVES for part in node.get(name, ())]
        if "$ref" in node:
            parts.append(node)
        if len(node.get("allOf", ())) > 1 or (parts and _constrains(node)):
            self._keep_open(parts, path)
            self._open.add(id(node))

    def _keep_open(self, parts: list[Any], path: str) -> None:
        for part in parts:
            if not isinstance(part, dict) or id(part) in self._open:
                continue
            self._open.add(id(part))
            inner = [p for name in _ALTERNATIVES for p in part.get(name, ())]
            self._keep_open(inner, path)
            if "$ref" in part:
                self._keep_open([self._target(part, path)], path)

    def _target(self, node: Any, path: str) -> Any:
        """The schema behind a chain of plain references."""
        for _ in range(MAX_DEPTH):
            if not isinstance(node, dict) or not str(node.get("$ref", "")).startswith("#/"):
                return node
            node = self.resolve(node, path)
        raise _Fault(f"{path}.$ref", "the reference leads back to itself")


def has_free_keys(node: Any) -> bool:
    """Whether a prepared schema lets the model choose keys: `Grammar.free_keys`."""
    if not isinstance(node, dict):
        return node is True
    return _is_open(node) or any(has_free_keys(child) for child, _ in _children(node, ""))


def _is_open(node: Schema) -> bool:
    if "object" not in node.get("type", ["object"]) or {"enum", "const", "$ref"} & set(node):
        return False
    if set(_ALTERNATIVES) & set(node) and not _constrains(node):
        return False
    return node.get("additionalProperties", True) is not False or "patternProperties" in node


def _constrains(node: Schema) -> bool:
    """Whether the node says anything of objects beside its alternatives."""
    return bool({"properties", "required", "patternProperties", "additionalProperties",
                 "minProperties", "maxProperties"} & set(node))  # fmt: skip


def _children(node: Schema, path: str) -> Iterator[tuple[Any, str]]:
    for name in ("items", "additionalProperties", "contains", "propertyNames"):
        if name in node:
            yield node[name], f".{name}"
    for name in (*_ALTERNATIVES, "prefixItems"):
        parts = node.get(name, [])
        if not isinstance(parts, list) or (name in node and not parts):
            raise _Fault(f"{path}.{name}", "expected a list of schemas that is not empty")
        yield from ((part, f".{name}[{i}]") for i, part in enumerate(parts))
    for name in ("properties", "patternProperties", "$defs", "definitions"):
        parts = node.get(name, {})
        if not isinstance(parts, dict):
            raise _Fault(f"{path}.{name}", "expected an object of schemas")
        yield from ((part, f".{name}.{key}") for key, part in parts.items())


def _check(node: Schema, path: str) -> None:
    """The keywords' own values. Raises `_Fault`."""
    for name in _UNSUPPORTED:
        if name in node:
            raise _Fault(f"{path}.{name}", "not supported")
    if node.get("unevaluatedProperties", False) is not False:
        raise _Fault(f"{path}.unevaluatedProperties", "only false is supported")
    node.pop("unevaluatedProperties", None)
    _check_type(node, path)
    if "enum" in node and (not isinstance(node["enum"], list) or not node["enum"]):
        raise _Fault(f"{path}.enum", "expected a list that is not empty")
    required = node.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise _Fault(f"{path}.required", "expected a list of strings")
    for name in _COUNTS:
        _check_count(node, name, path)
    for name in _BOUNDS:
        value = node.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _Fault(f"{path}.{name}", "expected a number")
        if abs(value) > _EXACT:
            _make_exact(node, name, path)
    _check_divisor(node, path)
    if not isinstance(node.get("pattern", ""), str):
        raise _Fault(f"{path}.pattern", "expected a regular expression")
    if "pattern" in node:
        node["pattern"] = translate(node["pattern"])
    if isinstance(node.get("patternProperties"), dict):
        patterns = node["patternProperties"].items()
        node["patternProperties"] = {translate(key): part for key, part in patterns}
    _check_format(node, path)


def _check_type(node: Schema, path: str) -> None:
    if "type" not in node:
        return
    types = node["type"] if isinstance(node["type"], list) else [node["type"]]
    for name in types:
        if not isinstance(name, str) or name not in _TYPES:
            raise _Fault(f"{path}.type", f"unknown type {str(name)[:40]!r}")
    if not types:
        raise _Fault(f"{path}.type", "the list is empty")


def _check_format(node: Schema, path: str) -> None:
    name = node.get("format")
    if name is None or name in formats.OTHERS:
        return
    if not isinstance(name, str) or name not in formats.PATTERNS.keys() | formats.HINTS:
        known = ", ".join(sorted(formats.PATTERNS.keys() | formats.OTHERS))
        raise _Fault(f"{path}.format", f"only these formats are supported: {known}")
    del node["format"]
    if name in formats.PATTERNS:
        pattern = f"^(?:{formats.PATTERNS[name]})$"
        if "pattern" in node:
            node["allOf"] = [*node.get("allOf", []), {"pattern": pattern}]
        else:
            node["pattern"] = pattern


def _check_count(node: Schema, name: str, path: str) -> None:
    if name not in node:
        return
    value = node[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise _Fault(f"{path}.{name}", "expected an integer")
    if value < 0:
        raise _Fault(f"{path}.{name}", "must be at least 0")
    node[name] = int(value)
    if value > _ENDLESS:
        if name.startswith("min"):
            raise _Fault(f"{path}.{name}", f"at most {_ENDLESS} can be demanded")
        del node[name]


def _make_exact(node: Schema, name: str, path: str) -> None:
    """Tighten a bound that is too large to be kept exactly, or refuse one that demands as much."""
    is_upper = name in ("maximum", "exclusiveMaximum")
    if name == "multipleOf" or (node[name] > 0) != is_upper:
        raise _Fault(f"{path}.{name}", f"at most ±{_EXACT} can be demanded")
    size = min(int(abs(node[name])) - name.startswith("exclusive"), _LARGEST)
    size -= size % _FLOAT_STEP
    node[name] = size if is_upper else -size


def _check_divisor(node: Schema, path: str) -> None:
    divisor = node.get("multipleOf", 1)
    if divisor <= 0:
        raise _Fault(f"{path}.multipleOf", "must be greater than 0")
    number = Decimal(repr(divisor)).normalize()
    decimals = max(-int(number.as_tuple().exponent), 0)
    if decimals > _MAX_DECIMALS or number.scaleb(decimals) > _MAX_DIVISOR:
        message = f"at most {_MAX_DIVISOR} (its decimal point aside) is supported"
        raise _Fault(f"{path}.multipleOf", message)
