"""Is the process there, can it serve, and what is it? All but the last need no API key.

A load balancer asks /health (or /ready, /ping) where to send requests. What restarts a container
asks /live: a server whose engine restarts has streams to continue and must not be killed.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from app.http.errors import ApiError
from app.served import Served

HEALTH_PATHS = ("/health", "/ping", "/ready")
OPEN_PATHS = frozenset({*HEALTH_PATHS, "/live"})
ADMIN_PATHS = ("/metrics", "/debug")  # and what is below them
_OK = b'{"status":"ok"}'


async def health(served: Served, request: Request) -> Response:
    """200 while every engine works, and what it warned of; 503 with the reason while one does not.

    Its supervisor notices within seconds that the engine died or hangs. Also 503 once the server
    was told to stop.
    """
    for model in served.models:
        if not model.engine.alive:
            failure = f"no engine serves ({model.engine.failure})"
            if len(served.models) > 1:
                failure = f"{model.name}: {failure}"
            raise ApiError(failure, status=503, code="engine_unavailable")
    if served.draining:
        raise ApiError("the server is shutting down", status=503, code="draining")
    warnings = [w for model in served.models for w in model.capabilities.warnings]
    if not warnings:
        return Response(_OK, media_type="application/json")
    body = msgspec.json.encode({"status": "ok", "warnings": warnings})
    return Response(body, media_type="application/json")


async def live(served: Served, request: Request) -> Response:
    """200 while the process is there: it restarts its engines, or ends when it cannot."""
    return Response(_OK, media_type="application/json")


async def server_version(served: Served, request: Request) -> Response:
    """The package's version."""
    try:
        name = version("slipstream")
    except PackageNotFoundError:  # run from a source tree that was never installed
        name = "unknown"
    return Response(msgspec.json.encode({"version": name}), media_type="application/json")
