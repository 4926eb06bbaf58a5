"""Is the process there, can it serve, and what is it? The only routes that need no API key."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from app.errors import ApiError
from app.served import Served

OPEN_PATHS = frozenset({"/health", "/ping", "/ready"})


async def health(served: Served, request: Request) -> Response:
    """200 while every engine works; 503 with the reason while it restarts or when it is gone.

    Its supervisor notices within seconds that the engine died or hangs.
    """
    for model in served.models:
        if not model.engine.alive:
            failure = f"no engine serves ({model.engine.failure})"
            if len(served.models) > 1:
                failure = f"{model.name}: {failure}"
            raise ApiError(failure, status=503, code="engine_unavailable")
    return Response(b'{"status":"ok"}', media_type="application/json")


async def server_version(served: Served, request: Request) -> Response:
    """The package's version."""
    try:
        name = version("slipstream")
    except PackageNotFoundError:  # run from a source tree that was never installed
        name = "unknown"
    return Response(msgspec.json.encode({"version": name}), media_type="application/json")
