"""On what terms a request is served: by when, in which order, sharing with whom."""

from __future__ import annotations

import re
import time
from typing import NamedTuple, Protocol

from starlette.requests import Request

from app.access.admission import whole_seconds
from app.access.keys import ANYONE, Key
from app.access.quota import Quota
from app.http.errors import ApiError

TIMEOUT_HEADER = "request-timeout-ms"
TTFT_HEADER = "x-slo-ttft-ms"
FAIRNESS_HEADER = "x-gateway-inference-fairness-id"
_MAX_TENANT = 200
FORECAST_HEADER = "x-predicted-ttft-ms"  # of responses
_MILLISECONDS = re.compile(r"[0-9]{1,8}(\.[0-9]{1,3})?", re.ASCII)
_MAX_MILLISECONDS = 86_400_000.0  # a day


class RunFields(Protocol):
    """The body's fields that say how jobs are run."""

    @property
    def priority(self) -> int: ...
    @property
    def cache_salt(self) -> str | None: ...


class Terms(NamedTuple):
    """Times are of the monotonic clock; None: any time will do."""

    deadline: float | None = None  # for the first token of every choice
    end_by: float | None = None  # for the whole answer
    priority: int = 0
    tenant: str = ""  # whose share of the engine it uses
    salt: bytes = b""
    quota: Quota = ANYONE.quota

    @classmethod
    def of(cls, request: Request, fields: RunFields) -> Terms:
        """Those of a request. Raises `ApiError` for a header that makes no sense, or a priority
        that its key may not ask for."""
        key = key_of(request)
        key.check_priority(fields.priority)
        arrival = arrival_of(request)
        first, whole = _seconds(request, TTFT_HEADER), _seconds(request, TIMEOUT_HEADER)
        end_by = None if whole is None else arrival + whole
        deadline = end_by if first is None else arrival + first
        if deadline is not None and end_by is not None:
            deadline = min(deadline, end_by)
        salt = (fields.cache_salt or "").encode()
        if key.name:  # what one key's prompts left in the cache, no other can find
            salt = key.name.encode() + b"\0" + salt
        return cls(deadline, end_by, fields.priority, _tenant(request, key), salt, key.quota)


def key_of(request: Request) -> Key:
    """Whose request it is."""
    key = request.scope.get("state", {}).get("key", ANYONE)
    assert isinstance(key, Key)
    return key


def _tenant(request: Request, key: Key) -> str:
    """The key's holder, or whom a gateway names. Others could multiply their share by it."""
    values = request.headers.getlist(FAIRNESS_HEADER)
    if not any(values) or not key.rights.gateway:
        return key.name
    named = values[0]
    if len(values) > 1 or len(named) > _MAX_TENANT:  # of several, a proxy may mean another
        raise ApiError(
            f"{FAIRNESS_HEADER}: expected one value of at most {_MAX_TENANT} characters",
            param=FAIRNESS_HEADER,
            code="invalid_value",
        )
    return f"{key.name}/{named}"


def arrival_of(request: Request) -> float:
    """When the request's head was there."""
    return float(request.scope.get("state", {}).get("arrival", time.monotonic()))


def end_by(request: Request) -> float | None:
    """When the whole answer must be there. Raises `ApiError`."""
    seconds = _seconds(request, TIMEOUT_HEADER)
    return None if seconds is None else arrival_of(request) + seconds


def _seconds(request: Request, header: str) -> float | None:
    text = request.headers.get(header)
    if text is None:
        return None
    value = float(text) if _MILLISECONDS.fullmatch(text.strip()) else 0.0
    if not 0 < value <= _MAX_MILLISECONDS:
        raise ApiError(
            f"{header}: expected milliseconds above 0 and up to {_MAX_MILLISECONDS:.0f}, "
            f"got {text[:50]!r}",
            param=header,
            code="invalid_value",
        )
    return value / 1e3


def expired(header: str) -> ApiError:
    """The time that a header gave has passed."""
    what = "answer was not complete" if header == TIMEOUT_HEADER else "first token was not there"
    return ApiError(
        f"the {what} within the time that {header} gives", status=504, code="deadline_exceeded"
    )


def unmeetable(forecast: float, left: float) -> ApiError:
    """The first token would come too late: no work is begun that nobody can use."""
    return ApiError(
        f"the first token is expected in {forecast * 1e3:.0f} ms, and must be there in "
        f"{left * 1e3:.0f} ms ({TTFT_HEADER} or {TIMEOUT_HEADER})",
        status=429,
        code="deadline_unmeetable",
        headers={
            "retry-after": str(whole_seconds(forecast - left)),
            FORECAST_HEADER: milliseconds(forecast),
        },
    )


def milliseconds(seconds: float) -> str:
    """For a header."""
    return f"{seconds * 1e3:.1f}"
