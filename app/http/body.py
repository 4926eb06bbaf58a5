"""Strict reading of JSON request bodies: every fault is a 400 that names the field."""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from app.http.errors import ApiError

T = TypeVar("T", bound=msgspec.Struct)

_AT_PATH = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?", re.DOTALL)
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING_FIELD = re.compile(r"Object missing required field `(?P<name>.*)`")
_SMALL = 65536  # bytes: a larger body would hold up everybody while its fault is looked for
_MAX_VALUES = 2_000_000  # JSON values of a larger body, roughly
_AT_ONCE = 16  # bodies of the largest size


class Bodies:
    """Bounds the bodies that are being received and parsed: each, and all together."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._most = largest * _AT_ONCE
        self._held = 0

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, counted until it is let go.

        Raises `ApiError` (413, or 429 if there are too many others) and `ClientDisconnect`.
        """
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self.largest:
            raise _too_large(f"is larger than {self.largest} bytes")
        chunks, size = [], 0
        try:
            async for chunk in request.stream():
                size += len(chunk)
                self._held += len(chunk)
                if size > self.largest:
                    raise _too_large(f"is larger than {self.largest} bytes")
                if self._held > self._most and size > _SMALL:
                    raise self._full()
                chunks.append(chunk)
            yield b"".join(chunks)
        finally:
            self._held -= size

    def _full(self) -> ApiError:
        return ApiError(
            f"the bodies of requests that are being received have {self._most} bytes together, "
            f"which is the limit; those of up to {_SMALL} bytes are still taken",
            status=429,
            code="max_received_bytes",
            headers={"retry-after": "1"},
        )


async def read_body(request: Request) -> None:
    """Read a body that says nothing. Raises as `Bodies.receive`."""
    async with _bodies(request).receive(request):
        pass


async def read_request(
    request: Request, schema: type[T], refused: Mapping[str, str]
) -> tuple[T, int]:
    """The request, and how many bytes it was. Raises as `Bodies.receive` and `parse_request`."""
    async with _bodies(request).receive(request) as body:
        return parse_request(body, schema, refused), len(body)


def _bodies(request: Request) -> Bodies:
    bodies: Bodies = request.app.state.bodies
    return bodies


def _too_large(what: str) -> ApiError:
    return ApiError(f"the request body {what}", status=413, code="request_too_large")


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Refuses NaN, Infinity, numbers beyond float64, bad UTF-8, deep nesting."""
    try:
        value = msgspec.json.decode(body) if len(body) <= _SMALL else _decode_large(body)
    except RecursionError:
        raise ApiError("the JSON body is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # msgspec.DecodeError and UnicodeDecodeError
        if len(body) <= _SMALL and (name := _not_finite(body)) is not None:
            message = f"{name}: expected a finite number"
            raise ApiError(message, param=name, code="invalid_value") from None
        raise ApiError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError("the body must be a JSON object", code="invalid_json")
    return value


def _decode_large(body: bytes) -> Any:
    """The decoder takes no breath: its time is bounded, to some 0.2 s for so many values."""
    if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise _too_large(f"has more than {_MAX_VALUES} commas and opening brackets")
    gc.disable()  # for a list of lists it would take most of the time
    try:
        return msgspec.json.decode(body)
    finally:
        gc.enable()


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
