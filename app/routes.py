"""Every route, and how `/openapi.json` describes it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any, NamedTuple

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from app import health, page
from app.anthropic import endpoints as anthropic
from app.anthropic.errors import ERROR_SCHEMA as ANTHROPIC_ERROR_SCHEMA
from app.anthropic.message import Message
from app.flights import endpoints as flights
from app.flights import live
from app.flights.waterfall import Waterfall
from app.http.errors import ERROR_SCHEMA
from app.openai import chat, completions, models, tokenization
from app.pooling import classify, embeddings, scoring
from app.responses import endpoints as responses
from app.responses.objects import ResponseObject
from app.schemas.chat import ChatRequest
from app.schemas.completions import CompletionRequest
from app.schemas.messages import CountTokensRequest, MessagesRequest
from app.schemas.pooling import ClassifyRequest, EmbeddingRequest, RerankRequest, ScoreRequest
from app.schemas.responses import ResponsesRequest
from app.schemas.tokenization import DetokenizeRequest, TokenizeRequest
from app.served import Served
from app.telemetry import exposition

# Takes the generating `Service`, or with `whole` all that is `Served`.
Handler = Callable[[Any, Request], Awaitable[Response]]
Struct = type[msgspec.Struct]


class Route(NamedTuple):
    """`body` and `answer` are the JSON of request and response, where they have some."""

    method: str
    path: str
    handler: Handler
    body: Struct | None = None
    answer: Struct | None = None
    streams: bool = False  # the answer may be server-sent events
    text: bool = False  # the answer is plain text
    errors: dict[str, Any] = ERROR_SCHEMA
    whole: bool = False  # of all models, not of the one that generates
    described: bool = True  # in `/openapi.json`


ROUTES = (
    *(Route("GET", path, health.health, whole=True) for path in health.HEALTH_PATHS),
    Route("GET", "/live", health.live, whole=True),
    Route("GET", "/version", health.server_version, whole=True),
    Route("GET", "/metrics", exposition.scrape, text=True, whole=True),
    Route("GET", "/v1/models", models.list_models, answer=models.ModelList, whole=True),
    Route(
        "GET", "/v1/models/{name:path}", models.get_model, answer=models.ModelCard, whole=True
    ),
    Route(
        "POST", "/v1/completions", completions.create_completion,
        CompletionRequest, completions.Completion, streams=True,
    ),
    Route(
        "POST", "/v1/chat/completions", chat.create_chat_completion,
        ChatRequest, chat.ChatCompletion, streams=True,
    ),
    Route(
        "POST", "/v1/responses", responses.create_response,
        ResponsesRequest, ResponseObject, streams=True,
    ),
    Route(
        "POST", "/v1/responses/input_tokens", responses.count_input_tokens,
        ResponsesRequest, responses.InputTokens,
    ),
    Route("GET", "/v1/responses/{response_id}", responses.get_response, answer=ResponseObject),
    Route(
        "DELETE", "/v1/responses/{response_id}", responses.delete_response,
        answer=responses.Deleted,
    ),
    Route(
        "GET", "/v1/responses/{response_id}/input_items", responses.list_input_items,
        answer=responses.ItemList,
    ),
    Route("POST", "/v1/responses/{response_id}/cancel", responses.cancel_response),
    Route(
        "POST", "/v1/messages", anthropic.create_message,
        MessagesRequest, Message, streams=True, errors=ANTHROPIC_ERROR_SCHEMA,
    ),
    Route(
        "POST", "/v1/messages/count_tokens", anthropic.count_tokens,
        CountTokensRequest, anthropic.TokenCount, errors=ANTHROPIC_ERROR_SCHEMA,
    ),
    Route(
        "POST", "/tokenize", tokenization.tokenize, TokenizeRequest, tokenization.Tokenized
    ),
    Route(
        "POST", "/detokenize", tokenization.detokenize,
        DetokenizeRequest, tokenization.Detokenized,
    ),
    Route(
        "POST", "/v1/embeddings", embeddings.create_embeddings,
        EmbeddingRequest, embeddings.EmbeddingList, whole=True,
    ),
    *(
        Route("POST", path, scoring.score, ScoreRequest, scoring.ScoreList, whole=True)
        for path in ("/score", "/v1/score")
    ),
    *(
        Route("POST", path, scoring.rerank, RerankRequest, scoring.Ranking, whole=True)
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    ),
    Route(
        "POST", "/classify", classify.classify, ClassifyRequest, classify.Classification,
        whole=True,
    ),
    *(Route("GET", path, page.serve_file, whole=True, described=False) for path in page.FILES),
    Route("GET", "/debug/live", live.live, whole=True, described=False),
    Route("GET", "/debug/requests", flights.list_requests, answer=flights.RequestList),
    Route("GET", "/debug/requests/{id:path}", flights.get_request, answer=Waterfall),
)  # fmt: skip

_STATUS = {
    "400": "the request is at fault",
    "401": "no or a wrong API key",
    "404": "there is no such thing",
    "413": "the body is too large",
    "429": "the queue is full",
    "500": "the server is at fault",
    "503": "no engine serves now",
    "default": "any other error",
}


def add_routes(app: FastAPI, served: Served) -> None:
    """Give `app` all routes."""
    for route in ROUTES:
        app.add_api_route(
            route.path,
            _endpoint(served, route),
            methods=[route.method],
            name=route.handler.__name__,
            operation_id=f"{route.handler.__name__}_{re.sub(r'[^a-z0-9]+', '_', route.path)}",
            description=(route.handler.__doc__ or "").strip(),
            response_model=None,
            responses=_responses(route),
            openapi_extra=_request(route),
            include_in_schema=route.described,
        )


def _endpoint(served: Served, route: Route) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        if route.whole:
            return await route.handler(served, request)
        if served.generator is None:
            served.refuse_generation()
        return await route.handler(served.generator, request)

    return endpoint


def _request(route: Route) -> dict[str, Any]:
    names = re.findall(r"{(\w+)(?::path)?}", route.path)
    described: dict[str, Any] = {
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    }
    if route.body is not None:
        content = {"application/json": {"schema": _json_schema(route.body)}}
        described["requestBody"] = {"content": content, "required": True}
    return described


def _responses(route: Route) -> dict[int | str, dict[str, Any]]:
    content: dict[str, Any] = {}
    if route.answer is not None:
        content["application/json"] = {"schema": _json_schema(route.answer)}
    if route.text:
        content["text/plain"] = {"schema": {"type": "string"}}
    if route.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    responses: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": {"application/json": {"schema": route.errors}}}
        for status, text in _STATUS.items()
    }
    return {200: {"description": "the answer", **({"content": content} if content else {})}} | (
        responses
    )


@cache
def _json_schema(schema: Struct) -> dict[str, Any]:
    (reference,), definitions = msgspec.json.schema_components([schema])
    inlined = _inline(reference, definitions)
    assert isinstance(inlined, dict)
    return inlined


def _inline(value: Any, definitions: dict[str, Any]) -> Any:
    """Replace references by what they name, since our definitions are not in OpenAPI's place."""
    if isinstance(value, list):
        return [_inline(item, definitions) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _inline(definitions[value["$ref"].rpartition("/")[2]], definitions)
    return {key: _inline(item, definitions) for key, item in value.items()}
