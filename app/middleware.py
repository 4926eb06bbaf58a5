"""What every request passes through: an id, the API key check, the end. Pure ASGI, no tasks."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Sequence
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.anthropic.errors import PREFIX
from app.errors import ApiError
from app.health import OPEN_PATHS
from app.served import Served

_SAFE_ID = re.compile(r"[\x21-\x7e]{1,200}")


class RequestId:
    """Gives back the client's `X-Request-Id`, or one of our own, with every response.

    It sees a request first, so it notes when that was.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _SAFE_ID.fullmatch(asked) else uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, arrival=time.monotonic())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                # A request's body may have named another one.
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = scope["state"]["request_id"]
                if scope["path"].startswith(PREFIX):  # Anthropic's clients know it by this name
                    headers["request-id"] = scope["state"]["request_id"]
            await send(message)

        await self._app(scope, receive, send_with_id)


def tenant_of(scope: Scope) -> str:
    """Whose request it is: a name for the API key's holder, empty where no key is needed."""
    return str(scope.get("state", {}).get("tenant", ""))


class ApiKeys:
    """Refuses requests without one of the keys, before anything of them is read."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        key = self._key(scope)
        if key is not None:
            # What belongs to a key's holder is known by this name, also after a restart.
            scope["state"]["tenant"] = hashlib.sha256(key).hexdigest()[:32]
            await self._app(scope, receive, send)
            return
        error = ApiError(
            "invalid or missing API key; send it as Authorization: Bearer KEY",
            status=401,
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error.response(scope)(scope, receive, send)

    def _key(self, scope: Scope) -> bytes | None:
        """The key that the request has, if it is one of ours."""
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # Every key is compared, so that the time taken says nothing about them.
        matches = [hmac.compare_digest(given.encode("latin-1"), key) for key in self._keys]
        return self._keys[matches.index(True)] if any(matches) else None


class Draining:
    """Once the server was told to stop, refuses new work; later tells requests that are cut off."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self._app = app
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and self._served.draining:
            await self._refuse(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:  # the time to drain is over; nobody else cancels
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = ApiError(
            "the server is shutting down",
            status=503,
            code="shutting_down",
            headers={"connection": "close", "retry-after": "1"},
        )
        await error.response(scope)(scope, receive, send)
