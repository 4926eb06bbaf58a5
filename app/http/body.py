"""Strict reading of JSON request bodies: every fault is a 400 that names the field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from app.http.errors import ApiError

T = TypeVar("T", bound=msgspec.Struct)

_AT_PATH = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING_FIELD = re.compile(r"Object missing required field `(?P<name>.*)`")
_MAX_SEARCHED = 65536  # bytes: a larger body would hold up everybody while its fault is looked for


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes. Raises `ApiError` (413) and `ClientDisconnect`."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        f"the request body is larger than {limit} bytes", status=413, code="request_too_large"
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Refuses NaN, Infinity, numbers beyond float64, bad UTF-8, deep nesting."""
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise ApiError("the JSON body is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # msgspec.DecodeError and UnicodeDecodeError
        if len(body) <= _MAX_SEARCHED and (name := _not_finite(body)) is not None:
            message = f"{name}: expected a finite number"
            raise ApiError(message, param=name, code="invalid_value") from None
        raise ApiError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError("the body must be a JSON object", code="invalid_json")
    return value


def _not_finite(body: bytes) -> str | None:
    """The first field with a NaN, an infinity or a number beyond float64, if that is the fault."""

    def found(value: Any) -> bool:
        if isinstance(value, dict):
            return any(map(found, value.values()))
        if isinstance(value, list):
            return any(map(found, value))
        return isinstance(value, float) and not math.isfinite(value)

    try:
        fields = json.loads(body)  # the standard library lets them through
        return next((k for k, v in fields.items() if found(v)), None)
    except (ValueError, RecursionError, AttributeError):
        return None


def parse_request(body: bytes, schema: type[T], refused: Mapping[str, str]) -> T:
    """Body to a request struct, without any coercion.

    An explicit null means absent. A field in `refused` is an error that gives the reason; a field
    that is in neither is an error too.
    """
    raw = parse_object(body)
    known = set(schema.__struct_encode_fields__)
    for name, value in raw.items():
        if name in refused and value is not None:
            raise ApiError(f"{name}: {refused[name]}", param=name, code="unsupported_parameter")
        if name not in known and name not in refused:
            raise _unknown(name)
    return convert({k: v for k, v in raw.items() if v is not None}, schema)


def convert(value: Any, schema: type[T]) -> T:
    """`msgspec.convert` with its complaint turned into an `ApiError` with `param`."""
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        raise _translate(str(error)) from None
    except RecursionError:
        raise ApiError("the JSON body is nested too deeply", code="invalid_json") from None


def _unknown(path: str) -> ApiError:
    return ApiError(f"unknown field: {path}", param=path, code="unknown_parameter")


def _translate(message: str) -> ApiError:
    match = _AT_PATH.fullmatch(message)
    assert match is not None  # the pattern matches any text
    what = match["what"]
    path = (match["path"] or "").partition("[...]")[0]  # msgspec names no keys of mappings
    if unknown := _UNKNOWN_FIELD.fullmatch(what):
        return _unknown(f"{path}.{unknown['name']}".lstrip("."))
    if missing := _MISSING_FIELD.fullmatch(what):
        path = f"{path}.{missing['name']}".lstrip(".")
        return ApiError(f"missing required field: {path}", param=path, code="missing_parameter")
    message = f"{path}: {what[:1].lower()}{what[1:]}" if path else what
    return ApiError(message, param=path or None, code="invalid_value")
