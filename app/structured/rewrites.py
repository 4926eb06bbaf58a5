"""Rewrites of JSON schemas into keywords that llguidance knows. Each keeps what is valid, or less.

Those that return a string say why they cannot.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
Resolve = Callable[[Any], Any]

_MAX_UNIQUE = 5  # values whose subsets are written out
_MOST = 64  # choices of keys that are
_ROUNDED_BELOW = 1e12  # from here on, whole numbers would be left out
ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "$comment", "$id", "$anchor", "$defs", "definitions",
})  # fmt: skip
_OBJECT = frozenset({"type", "properties", "required"}) | ANNOTATIONS


def old_keywords(node: Schema) -> None:
    """Keywords of older drafts as those of today."""
    for bound, exclusive in (
        ("minimum", "exclusiveMinimum"),
        ("maximum", "exclusiveMaximum"),
    ):
        if isinstance(node.get(exclusive), bool) and node.pop(exclusive) and bound in node:
            node[exclusive] = node.pop(bound)
    if isinstance(node.get("items"), list):
        node["prefixItems"] = node.pop("items")
        node["items"] = node.pop("additionalItems", True)
        if not node["prefixItems"]:
            del node["prefixItems"]
    dependencies = node.get("dependencies")
    if isinstance(dependencies, dict) and all(isinstance(d, list) for d in dependencies.values()):
        node["dependentRequired"] = node.pop("dependencies")


def close(node: Schema) -> str | None:
    """Forbid keys that the schema does not name, if it names any and does not speak of others."""
    if "properties" in node and "additionalProperties" not in node:
        if "patternProperties" not in node:
            # Required keys without a schema of their own may have any value.
            for name in node.get("required", ()):
                node["properties"].setdefault(name, {})
        node["additionalProperties"] = False
    return count_properties(node)


def count_properties(node: Schema) -> str | None:
    """How many keys an object has, by which of the optional ones it has."""
    names = node.get("properties")
    counted = {"minProperties", "maxProperties"} & set(node)
    if not names or not counted or set(names) <= set(node.get("required", ())):
        return None
    if node["additionalProperties"] is not False or "patternProperties" in node or "anyOf" in node:
        return "minProperties and maxProperties are only supported where all keys are named"
    required = [name for name in names if name in node.get("required", ())]
    optional = [name for name in names if name not in required]
    low = max(node.pop("minProperties", 0) - len(required), 0)
    high = min(node.pop("maxProperties", len(names)) - len(required), len(optional))
    if low > high:
        return "there are not as many keys as minProperties and maxProperties demand"
    parts: list[Schema]
    if high == len(optional):  # which are there at least; any other may be there, too
        sets = itertools.combinations(optional, low)
        parts = [{"required": [*required, *some]} for some in itertools.islice(sets, _MOST + 1)]
    else:
        counts = range(low, high + 1)
        every = itertools.chain(*(itertools.combinations(optional, count) for count in counts))
        parts = [
            {
                "properties": {name: names[name] for name in names if name in (*required, *some)},
                "required": [*required, *some],
            }
            for some in itertools.islice(every, _MOST + 1)
        ]
    if len(parts) > _MOST:
        return f"minProperties and maxProperties leave more than {_MOST} choices of keys"
    whole = {key: node.pop(key) for key in ("properties", "required", "type") if key in node}
    node["anyOf"] = [{**whole, **part, "additionalProperties": False} for part in parts]
    del node["additionalProperties"]
    return None


def open_interval(node: Schema) -> None:
    """Leave an excluded bound of numbers farther than readers round, and llguidance errs.

    It takes an excluded whole number into intervals shorter than 1; and 3.00000000000000001 is more
    than 3 in text, but not as float64.
    """
    low, high = node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
    width = high - low if low is not None and high is not None else 0.0
    is_float = "number" in node.get("type", "number") and "multipleOf" not in node
    for bound, excluded, sign, choose in (
        ("minimum", "exclusiveMinimum", 1, max),
        ("maximum", "exclusiveMaximum", -1, min),
    ):
        value = node.get(excluded)
        if value is None:
            continue
        if 0 < width < 1 and value == math.floor(value):
            size, digits = width, 3
        elif is_float and 0 < abs(value) < _ROUNDED_BELOW:
            size, digits = abs(value), 13
        else:
            continue
        step = math.floor(math.log10(size)) - digits
        farther = round(node.pop(excluded) + sign * 10.0**step, max(12, -step))
        node[bound] = choose(node.get(bound, farther), farther)


def contains(node: Schema) -> str | None:
    """The first items are those that must be contained."""
    if "contains" not in node:
        node.pop("minContains", None)
        return None
    if "prefixItems" in node:
        return "contains beside prefixItems is not supported"
    count = node.pop("minContains", 1)
    part = node.pop("contains")
    if count > 100:
        return "minContains may be at most 100"
    if count:
        items = node.get("items", True)
        node["prefixItems"] = [part if items is True else {"allOf": [part, items]}] * count
        node["minItems"] = max(count, node.get("minItems", 0))
    return None


def dependent_required(node: Schema) -> str | None:
    """What may become required is required."""
    dependencies = node.pop("dependentRequired", {})
    if not isinstance(dependencies, dict):
        return "dependentRequired must be an object"
    required = list(node.get("required", []))
    for names in dependencies.values():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return "dependentRequired must have lists of strings"
        required += names
    if required:
        node["required"] = list(dict.fromkeys(required))
    return None


def property_names(node: Schema) -> str | None:
    """Names by pattern or enumeration become properties."""
    names = node.pop("propertyNames", None)
    if names is None or names is True:
        return None
    if "properties" in node or "patternProperties" in node or not isinstance(names, dict):
        return "propertyNames is only supported without properties and patternProperties"
    constraints = set(names) - ANNOTATIONS - {"type"}
    values = node.pop("additionalProperties", True)
    node["additionalProperties"] = False
    if constraints == {"enum"} and all(isinstance(name, str) for name in names["enum"]):
        node["properties"] = dict.fromkeys(names["enum"], values)
    elif constraints == {"const"} and isinstance(names["const"], str):
        node["properties"] = {names["const"]: values}
    elif constraints == {"pattern"}:
        node["patternProperties"] = {names["pattern"]: values}
    elif constraints <= {"minLength", "maxLength"}:
        low, high = names.get("minLength", 0), names.get("maxLength", "")
        node["patternProperties"] = {rf"^[\s\S]{{{low},{high}}}$": values}
    else:
        return "propertyNames is only supported with one of enum, const, pattern and lengths"
    return None


def unique_items(node: Schema) -> str | None:
    """Of few possible values each selection is written out, in the schema's order."""
    if not node.pop("uniqueItems", False) or node.get("maxItems", 2) < 2:
        return None
    items = node.get("items", True)
    values = items.get("enum") if isinstance(items, dict) else None
    if isinstance(items, dict) and items.get("type") == "boolean":
        values = [False, True]
    if values is None or "prefixItems" in node or "anyOf" in node or "oneOf" in node:
        return "uniqueItems is only supported for items with an enum"
    values = list({_key(value): value for value in values}.values())
    if len(values) > _MAX_UNIQUE:
        return f"uniqueItems is only supported for at most {_MAX_UNIQUE} different values"
    low, high = node.pop("minItems", 0), node.pop("maxItems", len(values))
    selections = [
        selection
        for count in range(low, min(high, len(values)) + 1)
        for selection in itertools.combinations(values, count)
    ]
    if not selections:
        return "uniqueItems: there are fewer different values than minItems"
    node.pop("items")
    node["anyOf"] = [_exactly(selection) for selection in selections]
    return None


def _exactly(values: tuple[Any, ...]) -> Schema:
    if not values:
        return {"type": "array", "maxItems": 0}
    parts = [{"const": value} for value in values]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(values)}


def merge_all_of(node: Schema, resolve: Resolve) -> None:
    """One schema for a conjunction of plain objects (inheritance), so that it can be closed.

    A conjunction of one reference beside annotations is the reference.
    """
    if "allOf" not in node:
        return
    if set(node) - ANNOTATIONS == {"allOf"} and len(node["allOf"]) == 1:
        (part,) = node["allOf"]
        if isinstance(part, dict) and not set(part) & set(node):
            del node["allOf"]
            node.update(part)
        return
    parts = [resolve(part) for part in node["allOf"]]
    if not all(_is_plain_object(part) for part in parts) or set(node) - _OBJECT != {"allOf"}:
        return
    own = {name: node[name] for name in ("properties", "required") if name in node}
    properties: Schema = {}
    required: list[str] = []
    for part in [*parts, own]:
        for name, schema in part.get("properties", {}).items():
            if properties.setdefault(name, schema) != schema:
                return
        required += part.get("required", [])
    del node["allOf"]
    node["type"] = "object"
    node["properties"] = properties
    node["required"] = list(dict.fromkeys(required))


def _is_plain_object(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and set(part) <= _OBJECT
        and part.get("type", "object") == "object"
        and ("properties" in part or "required" in part)
    )


def exclusive_alternatives(node: Schema, resolve: Resolve) -> None:
    """`oneOf` becomes `anyOf` where no alternative's text can fit another."""
    parts = [resolve(part) for part in node.get("oneOf", ())]
    if "anyOf" in node or not parts:
        return
    if all(_excludes(a, b, resolve) for a, b in itertools.permutations(parts, 2)):
        node["anyOf"] = node.pop("oneOf")


def _excludes(written: Any, other: Any, resolve: Resolve, depth: int = 4) -> bool:
    """Whether what `written`'s grammar lets through is never valid for `other`."""
    written, other = resolve(written), resolve(other)
    if written is False or other is False:
        return True
    if not isinstance(written, dict) or not isinstance(other, dict) or depth == 0:
        return False
    types, others = _types(written), _types(other)
    if types and others and not types & others:
        return True
    if types <= {"number"} or others <= {"number"}:
        return _lowest(written) > _highest(other) or _lowest(other) > _highest(written)
    values, wanted = _values(written), _values(other)
    if values is not None and wanted is not None:
        return not values & wanted
    if types != {"object"} or "properties" not in written or _is_open(written):
        return False
    known = written["properties"]
    return any(
        name not in known
        or _excludes(known[name], other.get("properties", {}).get(name, True), resolve, depth - 1)
        for name in other.get("required", ())
    )


def _lowest(node: Schema) -> float:
    return max(node.get("minimum", -math.inf), node.get("exclusiveMinimum", -math.inf))


def _highest(node: Schema) -> float:
    return min(node.get("maximum", math.inf), node.get("exclusiveMaximum", math.inf))


def _is_open(node: Schema) -> bool:
    return bool(
        node.get("additionalProperties", False) is not False
        or set(node) & {"patternProperties", "anyOf", "oneOf", "allOf", "$ref"}
    )


def _types(node: Schema) -> set[str]:
    """The types a value may have, integers being numbers; empty if that is not said."""
    if (values := node.get("enum", [node["const"]] if "const" in node else None)) is not None:
        return {_type(value) for value in values}
    names = node.get("type", [])
    names = [names] if isinstance(names, str) else names
    return {"number" if name == "integer" else name for name in names}


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    if isinstance(value, list | dict):
        return "array" if isinstance(value, list) else "object"
    return "null"


def _values(node: Schema) -> set[str] | None:
    values = node.get("enum", [node["const"]] if "const" in node else None)
    return None if values is None else {_key(value) for value in values}


def _key(value: Any) -> str:
    """Equal values, equal keys: 1 and 1.0 are the same number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)
