"""`GET /debug/requests` and `GET /debug/requests/{id}`: why was this slow?"""

from __future__ import annotations

from itertools import islice

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from app.flights.recorder import KEPT_LANES
from app.flights.verdict import tell
from app.flights.waterfall import View, Waterfall
from app.http.errors import ApiError
from app.http.query import limit_of, parameters
from app.middleware import sees
from app.service import Service

_PAGE, _MAX_PAGE = 50, 1000


class RequestSummary(msgspec.Struct):
    """A request in a list; tokens are of all its choices, each prompt counted for each of them."""

    id: str
    request_id: str
    path: str
    state: str
    finish: str | None
    received: float
    seconds: float
    time_to_first_token: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    verdict: str


class RequestList(msgspec.Struct):
    data: list[RequestSummary]
    object: str = "list"


async def list_requests(service: Service, request: Request) -> Response:
    """The requests of this API key that run or ended lately, newest first, running ones before.

    `limit` of them, by default 50.
    """
    limit = limit_of(parameters(request, {"limit"}), _PAGE, _MAX_PAGE)
    tenant = sees(request.scope)
    view = View(service.flights, tenant)
    flights = islice(service.flights.newest(tenant), limit)
    return _json(RequestList([_summary(tell(view, flight)) for flight in flights]))


async def get_request(service: Service, request: Request) -> Response:
    """What happened to a request, when and why: the id is its `x-request-id` or its answer's id."""
    parameters(request, set())
    id, tenant = request.path_params["id"], sees(request.scope)
    flight = service.flights.find(id, tenant)
    if flight is None:
        message = f"no request with the id {id[:200]!r} is among the last {KEPT_LANES}"
        raise ApiError(message, status=404, param="id", code="request_not_found")
    return _json(tell(View(service.flights, tenant), flight))


def _summary(w: Waterfall) -> RequestSummary:
    return RequestSummary(
        w.id,
        w.request_id,
        w.path,
        w.state,
        w.finish,
        w.received,
        w.seconds,
        w.time_to_first_token,
        sum(sequence.prompt_tokens for sequence in w.sequences),
        sum(sequence.cached_tokens for sequence in w.sequences),
        sum(sequence.output_tokens for sequence in w.sequences),
        w.verdict,
    )


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
