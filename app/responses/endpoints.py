"""`/v1/responses`: create, count, get, list the input of, delete."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from app.http.body import parse_object, read_body, read_request
from app.http.errors import ApiError
from app.http.query import bad_parameter, limit_of, parameters
from app.middleware import tenant_of
from app.offload import prepare
from app.outputs.answer import answer
from app.responses.handler import ResponsesHandler
from app.responses.items import Item, input_items
from app.responses.request import check
from app.responses.store import Stored
from app.schemas.responses import REFUSED, ResponsesRequest
from app.service import Service

_MAX_PAGE = 100


class ItemList(msgspec.Struct):
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


class Deleted(msgspec.Struct):
    id: str
    object: str = "response"
    deleted: bool = True


class InputTokens(msgspec.Struct):
    input_tokens: int
    object: str = "response.input_tokens"


async def create_response(service: Service, request: Request) -> Response:
    """Generate a response, kept unless `store` is false."""
    fields, handler, size = await _prepare(service, request)
    return await answer(
        service, request, fields, handler, samples=1, body_bytes=size, ending=handler.ending
    )


async def count_input_tokens(service: Service, request: Request) -> Response:
    """How many tokens the input of such a request would have."""
    _, handler, size = await _prepare(service, request)
    await prepare(handler.prepare, size)
    return _json(InputTokens(len(handler.jobs[0].prompt)))


async def get_response(service: Service, request: Request) -> Response:
    """A kept response."""
    query = parameters(request, {"stream", "include", "include_obfuscation", "starting_after"})
    if query.get("stream", "false") != "false" or "starting_after" in query:
        raise bad_parameter("stream", "a response can only be streamed while it is generated")
    stored = await _find(service, request, request.path_params["response_id"])
    return Response(stored.response, media_type="application/json")


async def list_input_items(service: Service, request: Request) -> Response:
    """The items that a kept response was generated from, page by page."""
    query = parameters(request, {"limit", "order", "after", "include"})
    limit, order = limit_of(query, 20, _MAX_PAGE), query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise bad_parameter("order", "expected asc or desc")
    stored = await _find(service, request, request.path_params["response_id"])
    items = await prepare(lambda: _items(stored.input), stored.size)
    if order == "desc":
        items.reverse()
    if (after := query.get("after")) is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise bad_parameter("after", "there is no such item")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return _json(ItemList(page, first, last, len(items) > len(page)))


async def delete_response(service: Service, request: Request) -> Response:
    """Forget a kept response."""
    parameters(request, set())
    id = request.path_params["response_id"]
    if not await service.responses.delete(id, tenant_of(request.scope)):
        raise _not_found(id)
    return _json(Deleted(id))


async def cancel_response(service: Service, request: Request) -> Response:
    """Always refused: only responses generated in the background could be cancelled."""
    await read_body(request)
    await _find(service, request, request.path_params["response_id"])
    raise ApiError(
        "only responses generated in the background can be cancelled; this one is complete",
        param="response_id",
        code="invalid_value",
    )


async def _prepare(
    service: Service, request: Request
) -> tuple[ResponsesRequest, ResponsesHandler, int]:
    """The request, its handler, and how many bytes these are with the previous response."""
    fields, size = await read_request(request, ResponsesRequest, REFUSED)
    service.check_model(fields.model)
    check(fields)
    owner = tenant_of(request.scope)
    previous = None
    if fields.previous_response_id is not None:
        previous = await service.responses.get(fields.previous_response_id, owner, time.time())
        if previous is None:
            raise _not_found(fields.previous_response_id, "previous_response_id", 400)
        size += previous.size
    store = service.responses if fields.store else None

    def work() -> ResponsesHandler:
        return ResponsesHandler(service, fields, _context(fields, previous), store, owner)

    return fields, await prepare(work, size), size


def _context(fields: ResponsesRequest, previous: Stored | None) -> list[Item]:
    """What the previous response was made from, itself, and the input. Raises `ApiError`."""
    items = input_items(fields.input)
    if previous is None:
        return items
    output = parse_object(previous.response)["output"]
    # A call that was cut off has arguments that nobody can read.
    whole = [i for i in output if i["type"] != "function_call" or i["status"] == "completed"]
    return [*_items(previous.input), *(input_items(whole) if whole else ()), *items]


def _items(stored: bytes) -> list[Item]:
    return msgspec.json.decode(stored, type=list[Item])


async def _find(service: Service, request: Request, id: str) -> Stored:
    stored = await service.responses.get(id, tenant_of(request.scope), time.time())
    if stored is None:
        raise _not_found(id)
    return stored


def _not_found(id: str, param: str = "response_id", status: int = 404) -> ApiError:
    return ApiError(
        f"there is no response with the id {id[:200]!r}",
        status=status,
        param=param,
        code="response_not_found" if status == 404 else "previous_response_not_found",
    )


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
