"""Response headers that tell of the server's load, and of what a request was told to expect."""

from __future__ import annotations

import msgspec
from starlette.requests import Request

from app.access.terms import FORECAST_HEADER, milliseconds
from app.http.errors import ApiError
from app.outputs.generation import Generation
from app.service import Service

# Open Request Cost Aggregation: how load balancers ask a server for its load, and are told.
LOAD_FORMAT_HEADER = "endpoint-load-metrics-format"
LOAD_HEADER = "endpoint-load-metrics"
POSITION_HEADER = "x-queue-position"


def load_format(request: Request) -> str | None:
    """The format that the load is asked in. Raises `ApiError`."""
    asked = request.headers.get(LOAD_FORMAT_HEADER)
    if asked is None:
        return None
    if (wanted := asked.strip().upper()) in ("TEXT", "JSON"):
        return wanted
    raise ApiError(
        f"{LOAD_FORMAT_HEADER}: expected TEXT or JSON, got {asked[:50]!r}",
        param=LOAD_FORMAT_HEADER,
        code="invalid_value",
    )


def load_report(service: Service, wanted: str) -> str:
    """The load as vLLM reports it, in TEXT or JSON."""
    stats = service.engine.stats
    metrics = {
        "kv_cache_usage_perc": stats.kv_usage,
        "num_requests_waiting": float(stats.waiting),
    }
    if wanted == "JSON":
        return f"JSON {msgspec.json.encode({'named_metrics': metrics}).decode()}"
    return "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in metrics.items())


def forecast_headers(generation: Generation) -> dict[str, str]:
    """What was ahead of a request when it came, and when its first token was expected."""
    headers = {POSITION_HEADER: str(generation.position)}
    if generation.forecast is not None:
        headers[FORECAST_HEADER] = milliseconds(generation.forecast)
    return headers
