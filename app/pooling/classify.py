"""`POST /classify`: the probabilities of a classifier's labels."""

from __future__ import annotations

import time
from uuid import uuid4

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from app.http.body import read_request
from app.pooling.embeddings import PoolUsage
from app.pooling.scoring import activate
from app.schemas.pooling import REFUSED_CLASSIFY, ClassifyRequest
from app.served import Served


class Classified(msgspec.Struct):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classification(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Classified]
    usage: PoolUsage
    object: str = "list"


async def classify(served: Served, request: Request) -> Response:
    """The likeliest label of each text and the probabilities of all."""
    fields, size = await read_request(request, ClassifyRequest, REFUSED_CLASSIFY)
    model = served.pick(fields.model, ("classify",))
    capabilities = model.capabilities
    texts, numbers = await model.compute_input(fields, request, size)
    activation = capabilities.activation if fields.use_activation else "identity"
    data = [
        Classified(index, capabilities.labels[int(row.argmax())], row.tolist(), len(row))
        for index, row in enumerate(activate(numbers.astype(np.float64), activation))
    ]
    answer = Classification(
        f"classify-{uuid4().hex}", int(time.time()), model.name, data, PoolUsage.of(texts)
    )
    return Response(msgspec.json.encode(answer), media_type="application/json")
