"""Errors in OpenAI's shape: an object `error` with message, type, param and code, none left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from app.anthropic import errors as anthropic
from batching.engine.client import EngineDeadError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_CLIENT_CLOSED_REQUEST = 499  # nginx's code; nobody is left to read it, logs are


class ApiError(Exception):
    """A fault that the client is told about.

    `param` names the offending field (`messages[0].role`); `code` is a short stable word.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> bytes:
        """The error object as JSON."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})

    def response(self, scope: Scope) -> Response:
        """In the shape of the request's route; faults of ours name the request."""
        error = with_request_id(self, scope)
        state = scope.setdefault("state", {})
        state["error"] = self.code  # for who tells of the request when it has ended
        request_id = state.get("request_id")
        is_theirs = scope["path"].startswith(anthropic.PREFIX)
        body = anthropic.error_body(error, request_id) if is_theirs else error.body()
        return Response(body, self.status, self.headers, "application/json")


def no_such_model(name: str) -> ApiError:
    """404, with OpenAI's code."""
    return ApiError(
        f"the model {name[:200]!r} does not exist",
        status=404,
        param="model",
        code="model_not_found",
    )


def engine_error(message: str | None) -> ApiError:
    """The engine could not serve a request that was valid, and cannot: clients need not retry."""
    return ApiError(
        message or "the engine failed",
        status=500,
        code="engine_error",
        headers={"x-should-retry": "false"},  # as OpenAI's and Anthropic's clients know it
    )


@contextmanager
def renamed(name: Callable[[str], str]) -> Iterator[None]:
    """Errors about fields that were translated are raised with the names they had before."""
    try:
        yield
    except ApiError as error:
        if error.param is None or (param := name(error.param)) == error.param:
            raise
        message = error.message.replace(error.param, param, 1)
        raise ApiError(
            message, status=error.status, param=param, code=error.code, headers=error.headers
        ) from None


def with_request_id(error: ApiError, scope: Scope) -> ApiError:
    """A fault of ours names the request, so that whoever reports it can be helped."""
    request_id = scope.get("state", {}).get("request_id")
    if error.status < 500 or request_id is None:
        return error
    message = f"{error.message} (request {request_id})"
    return ApiError(message, status=error.status, code=error.code, headers=error.headers)


def engine_dead(error: EngineDeadError) -> ApiError:
    """There is no engine to serve the request; trying again later may help."""
    return ApiError(str(error), status=503, code="engine_unavailable", headers={"retry-after": "5"})


def shutting_down() -> ApiError:
    """The time in which open requests are finished is over, or nothing new is begun in it."""
    return ApiError(
        "the server is shutting down",
        status=503,
        code="shutting_down",
        headers={"connection": "close", "retry-after": "1"},
    )


def _allowed_methods(request: Request) -> str:
    """Of all routes with the path's pattern: Starlette looks no further than the first."""
    scope = dict(request.scope) | {"method": "none"}
    routes = request.app.routes
    first = next(route for route in routes if route.matches(scope)[0] is not Match.NONE)
    methods = (route.methods or () for route in routes if route.path == first.path)
    return ", ".join(sorted({method for each in methods for method in each}))


def install_error_handlers(app: FastAPI) -> None:
    """Give every way a request can fail the same shape."""

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response(request.scope)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = str(error.detail or HTTPStatus(error.status_code).phrase)
        if error.status_code == 404:
            message = f"no such endpoint: {request.method} {request.url.path}"
        headers = error.headers
        if error.status_code == 405:
            headers = {"allow": _allowed_methods(request)}
        plain = ApiError(message, status=error.status_code, headers=headers)
        return plain.response(request.scope)

    async def dead_engine(request: Request, error: Exception) -> Response:
        assert isinstance(error, EngineDeadError)
        return engine_dead(error).response(request.scope)

    async def disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)

    async def unexpected(request: Request, error: Exception) -> Response:
        failure = ApiError("internal server error", status=500, code="internal_error")
        response = failure.response(request.scope)
        # This handler runs outside of all middleware, the one that adds the id included.
        response.headers["x-request-id"] = request.scope.get("state", {}).get("request_id", "")
        return response

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(EngineDeadError, dead_engine)
    app.add_exception_handler(ClientDisconnect, disconnect)
    app.add_exception_handler(Exception, unexpected)
