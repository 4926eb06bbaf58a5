"""Which keys of a prepared schema have values that may be anything of their types."""

from __future__ import annotations

from typing import Any

from app.structured.rewrites import ANNOTATIONS, Schema

_SCALARS = frozenset({"string", "integer", "number", "boolean", "null"})
_LISTS = frozenset({"type", "items", "minItems", "maxItems"})


def free_values(prepared: Schema) -> tuple[str, ...] | None:
    """`Grammar.free_values` of a schema that leaves no keys free."""
    free: dict[str, bool] = {}
    open_parts: list[Any] = [prepared]
    while open_parts:
        part = open_parts.pop()
        if isinstance(part, dict):
            if part.get("additionalProperties", False) is not False or "patternProperties" in part:
                return None  # what other keys may be called, these may be, too
            if _has_object(part.get("const")) or _has_object(part.get("enum")):
                return None
            named = part.get("properties")
            for name, value in named.items() if isinstance(named, dict) else ():
                free[name] = free.get(name, True) and _is_free(value)
        open_parts.extend(_inner(part))
    return tuple(name for name, is_free in free.items() if is_free)


def _is_free(value: Any) -> bool:
    """Whether it is a scalar of any value, an array of strings, or a choice of such."""
    if not isinstance(value, dict):
        return False
    said = set(value) - ANNOTATIONS
    if said == {"anyOf"}:
        return all(map(_is_free, value["anyOf"]))
    types = value.get("type", [])
    if types == "array" and said <= _LISTS:
        items = value.get("items")
        return isinstance(items, dict) and items.get("type") == "string" and _is_free(items)
    return said == {"type"} and set([types] if isinstance(types, str) else types) <= _SCALARS


def _has_object(value: Any) -> bool:
    return isinstance(value, dict) or any(map(_has_object, _inner(value)))


def _inner(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
