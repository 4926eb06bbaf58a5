"""What every request passes through: an id, the API key check, the end. Pure ASGI, no tasks."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Collection
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access.keys import Key, KeyRing
from app.access.quota import Quota
from app.anthropic.errors import PREFIX
from app.health import ADMIN_PATHS, OPEN_PATHS
from app.http.errors import ApiError, shutting_down
from app.page import FILES as PAGE_FILES
from app.served import Served

_OPEN = OPEN_PATHS | PAGE_FILES.keys()
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


def sees(scope: Scope) -> str | None:
    """Whose requests it may be told of: its tenant's; an admin's key sees all (None)."""
    key = scope.get("state", {}).get("key")
    return None if key is not None and key.rights.admin else tenant_of(scope)


class ApiKeys:
    """Refuses requests without a key that may make them, before anything of them is read."""

    def __init__(self, app: ASGIApp, keys: KeyRing, origins: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        key = self._keys.find(_secret(scope))
        if (error := self._fault(scope, key)) is not None:
            await error.response(scope)(scope, receive, send)
        elif key is None:
            await self._app(scope, receive, send)
        else:
            scope["state"].update(key=key, tenant=key.name)
            await self._within_quota(key.quota, scope, receive, send)

    def _fault(self, scope: Scope, key: Key | None) -> ApiError | None:
        is_guarded = scope["path"].startswith(ADMIN_PATHS) and self._keys.guards_admin
        if key is None and (is_guarded or self._keys.required):
            return ApiError(
                "invalid or missing API key; send it as Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if key is not None and is_guarded and not key.rights.admin:
            return ApiError("this key is not an admin's", status=403, code="admin_only")
        if key is None and self._is_foreign(Headers(scope=scope)):
            return ApiError(
                "without API keys, pages of other origins may call only if cors_origins names them",
                status=403,
                code="origin_not_allowed",
            )
        return None

    def _is_foreign(self, headers: Headers) -> bool:
        """Whether a page sent it that we know nothing of: browsers say whose page it is."""
        origin = headers.get("origin")
        if origin is None or origin in self._origins or "*" in self._origins:
            return False
        return origin.partition("://")[2] != headers.get("host")

    async def _within_quota(self, quota: Quota, scope: Scope, receive: Receive, send: Send) -> None:
        """What makes work is counted, and is told what is left."""

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(quota.headers())
            await send(message)

        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            quota.enter()
        except ApiError as error:
            await error.response(scope)(scope, receive, send_with_limits)
            return
        try:
            await self._app(scope, receive, send_with_limits)
        finally:
            quota.leave()


def _secret(scope: Scope) -> bytes:
    headers = Headers(scope=scope)
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return given.encode("latin-1")


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
        await shutting_down().response(scope)(scope, receive, send)
