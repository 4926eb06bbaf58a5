"""What is wrong with a text that was made for a schema."""

from __future__ import annotations

import datetime
import json
from typing import Any

import jsonschema

FORMATS = jsonschema.FormatChecker()


@FORMATS.checks("date-time", ValueError)
def is_date_time(value: object) -> bool:
    return not isinstance(value, str) or bool(datetime.datetime.fromisoformat(value).tzinfo)


@FORMATS.checks("time", ValueError)
def is_time(value: object) -> bool:
    return not isinstance(value, str) or bool(datetime.time.fromisoformat(value).tzinfo)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), f"a key comes twice: {[key for key, _ in pairs]}"
    return dict(pairs)


def fault(text: str | None, schema: Any) -> str | None:
    """What is wrong with a text that was made for a schema."""
    if text is None:
        return "does not end"
    try:
        value = json.loads(text, object_pairs_hook=unique)
        validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        validator(schema, format_checker=FORMATS).validate(value)
    except (ValueError, OverflowError, AssertionError, jsonschema.ValidationError) as error:
        return f"{str(error).splitlines()[0]}: {text}"
    if text != text.strip():
        return f"white space around {text}"
    if isinstance(value, dict) and isinstance(schema, dict):
        order = [key for key in schema.get("properties", {}) if key in value]
        if [key for key in value if key in order] != order:
            return f"not in the schema's order: {text}"
    return None
