"""Is the process there, can it serve, and what is it? The only routes that need no API key."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from app.errors import ApiError
from app.service import Service

OPEN_PATHS = frozenset({"/health", "/ping", "/ready"})


async def health(service: Service, request: Request) -> Response:
    """200 while the engine works; 503 with the reason while it restarts or when it is gone.

    Its supervisor notices within seconds that the engine died or hangs.
    """
    engine = service.engine
    if not engine.alive:
        raise ApiError(
            f"no engine serves ({engine.failure})", status=503, code="engine_unavailable"
        )
    return Response(b'{"status":"ok"}', media_type="application/json")


async def server_version(service: Service, request: Request) -> Response:
    """The package's version."""
    try:
        name = version("slipstream")
    except PackageNotFoundError:  # run from a source tree that was never installed
        name = "unknown"
    return Response(msgspec.json.encode({"version": name}), media_type="application/json")
