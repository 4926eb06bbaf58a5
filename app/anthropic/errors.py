"""Errors in Anthropic's shape, on its routes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from app.http.errors import ApiError

PREFIX = "/v1/messages"  # of all routes with this shape

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

ERROR_SCHEMA = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "request_id": {"type": ["string", "null"]},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


def error_body(error: ApiError, request_id: str | None) -> bytes:
    """The error object as JSON."""
    default = "invalid_request_error" if error.status < 500 else "api_error"
    return msgspec.json.encode(
        {
            "type": "error",
            "error": {"type": _TYPES.get(error.status, default), "message": error.message},
            "request_id": request_id,
        }
    )
