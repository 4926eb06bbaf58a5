"""What is told of each HTTP request when it has ended. Never a word of what was said in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.flights.record import Flight
from app.telemetry.log_format import Facts
from app.telemetry.timings import Phases

if TYPE_CHECKING:
    from app.served import Served

logger = logging.getLogger(__name__)

_INTERNAL_ERROR = 500  # what nobody caught is answered with, outside of all middleware


class Pooled(NamedTuple):
    """What a pooling model did for a request. Times are monotonic seconds."""

    model: str
    texts: int
    tokens: int
    arrival: float
    scheduled: float  # its first batch
    finished: float  # its last batch


class Account(NamedTuple):
    """A request that has ended; `flight` or `pooled` if a model was asked to compute something."""

    scope: Scope
    status: int
    began: float  # monotonic seconds
    ended: float
    model: str | None
    flight: Flight | None
    pooled: Pooled | None

    @property
    def error(self) -> str | None:
        """The `code` of the error that it was answered with."""
        code: str | None = self.scope["state"].get("error")
        return code

    @property
    def finish(self) -> str:
        """Why its sequences ended: one reason, or those of all if they differ."""
        reasons = [lane.finish or "" for lane in self.flight.lanes] if self.flight else []
        return reasons[0] if len(set(reasons)) == 1 else ",".join(reasons)


Listener = Callable[[Account], None]


class Accounts:
    """Makes an account of each request and hands it to all listeners."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self._app = app
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _INTERNAL_ERROR

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            account = self._account(scope, status)
            for listener in self._served.listeners:
                try:
                    listener(account)
                except Exception:  # whoever watches must not break what is watched
                    logger.exception("a request cannot be told of")

    def _account(self, scope: Scope, status: int) -> Account:
        state = scope["state"]
        flight: Flight | None = state.get("flight")
        pooled: Pooled | None = state.get("pooled")
        if flight is not None and not flight.lanes:
            flight = None  # it was refused
        model = pooled.model if pooled is not None else None
        if flight is not None and (generator := self._served.generator) is not None:
            model = generator.name
        return Account(scope, status, state["arrival"], time.monotonic(), model, flight, pooled)


def log_account(account: Account) -> None:
    """One line: at debug level for those that ask for no work."""
    level = logging.INFO if account.scope["method"] == "POST" else logging.DEBUG
    if logger.isEnabledFor(level):
        logger.log(level, Facts("request", _facts(account)))


def _facts(account: Account) -> dict[str, Any]:
    scope, flight, pooled = account.scope, account.flight, account.pooled
    facts = {
        "request_id": scope["state"]["request_id"],
        "method": scope["method"],
        "path": scope["path"],
        "status": account.status,
        "error": account.error,
        "tenant": scope["state"].get("tenant"),
        "model": account.model,
    }
    queue = prefill = decode = None
    if flight is not None:
        phases = Phases.of(flight.lanes)
        queue, prefill, decode = phases.queue, phases.prefill, phases.decode
        facts |= {"stream": flight.streamed, "choices": len(flight.lanes), "finish": account.finish}
        if (usage := flight.usage) is not None:
            facts |= {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                "completion_tokens": usage.completion_tokens,
            }
    elif pooled is not None:
        queue, prefill = pooled.scheduled - pooled.arrival, pooled.finished - pooled.scheduled
        facts |= {"texts": pooled.texts, "prompt_tokens": pooled.tokens}
    times = {
        "queue_ms": queue,
        "prefill_ms": prefill,
        "decode_ms": decode,
        "total_ms": account.ended - account.began,
    }
    facts |= {name: None if t is None else round(t * 1e3, 3) for name, t in times.items()}
    return {name: value for name, value in facts.items() if value is not None}
