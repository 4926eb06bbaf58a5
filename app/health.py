"""Is the process there, can it serve, and what is it? The only routes that need no API key."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import msgspec
from starlette.responses import Response

from app.errors import ApiError
from app.service import Service

# Steps are bounded to fractions of a second; an idle engine speaks once per second.
_HEARTBEAT_LIMIT_SECONDS = 30.0

OPEN_PATHS = frozenset({"/health", "/ping", "/ready"})


def health(service: Service) -> Response:
    """200 while the engine works, 503 when it is dead or silent."""
    engine = service.engine
    if not engine.alive:
        raise ApiError("the engine is not running", status=503, code="engine_unavailable")
    if engine.heartbeat_age > _HEARTBEAT_LIMIT_SECONDS:
        raise ApiError(
            f"the engine has been silent for {engine.heartbeat_age:.0f} s",
            status=503,
            code="engine_unavailable",
        )
    return Response(b'{"status":"ok"}', media_type="application/json")


def server_version() -> Response:
    """The package's version."""
    try:
        name = version("slipstream")
    except PackageNotFoundError:  # run from a source tree that was never installed
        name = "unknown"
    return Response(msgspec.json.encode({"version": name}), media_type="application/json")
