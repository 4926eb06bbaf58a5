"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from app.service import Service


class ModelCard(msgspec.Struct):
    id: str
    created: int
    root: str
    max_model_len: int
    parent: None = None
    object: str = "model"
    owned_by: str = "slipstream"


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: str = "list"


async def list_models(service: Service, request: Request) -> Response:
    """The one served model."""
    return _json(ModelList([_card(service)]))


async def get_model(service: Service, request: Request) -> Response:
    """One model. Raises `ApiError` (404)."""
    service.check_model(request.path_params["name"])
    return _json(_card(service))


def _card(service: Service) -> ModelCard:
    limit = service.capabilities.max_model_len
    return ModelCard(service.model_name, service.created, service.model_name, limit)


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
