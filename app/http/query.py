"""Query parameters: known by name, or refused."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request

from app.http.errors import ApiError


def parameters(request: Request, known: set[str]) -> dict[str, str]:
    """The query. Raises `ApiError` for what is not in `known`."""
    for name in request.query_params:
        # Lists are sent as include[]=…
        if name.removesuffix("[]") not in known:
            raise ApiError(f"unknown parameter: {name}", param=name, code="unknown_parameter")
    return dict(request.query_params)


def limit_of(query: Mapping[str, str], default: int, most: int) -> int:
    """The parameter `limit`. Raises `ApiError`."""
    limit = query.get("limit", str(default))
    if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= most):
        raise bad_parameter("limit", f"expected 1 to {most}")
    return int(limit)


def bad_parameter(param: str, message: str) -> ApiError:
    """A value that is not among those it may have."""
    return ApiError(f"{param}: {message}", param=param, code="invalid_value")
