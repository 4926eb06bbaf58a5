"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from app.http.errors import no_such_model
from app.pooling.model import PoolModel
from app.served import Served
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


async def list_models(served: Served, request: Request) -> Response:
    """All served models, the one that generates first."""
    return _json(ModelList([_card(model) for model in served.models]))


async def get_model(served: Served, request: Request) -> Response:
    """One model. Raises `ApiError` (404)."""
    name = request.path_params["name"]
    for model in served.models:
        if model.name == name:
            return _json(_card(model))
    raise no_such_model(name)


def _card(model: Service | PoolModel) -> ModelCard:
    return ModelCard(model.name, model.created, model.name, model.capabilities.max_model_len)


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
