"""`POST /v1/embeddings`."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from uuid import uuid4

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from app.http.body import read_request
from app.offload import prepare
from app.pooling.inputs import Encoded, bad
from app.pooling.model import Numbers, PoolModel
from app.schemas.pooling import REFUSED_EMBEDDING, EmbeddingRequest
from app.served import Served


class PoolUsage(msgspec.Struct):
    """Every token that the model read counts once."""

    prompt_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, texts: list[Encoded]) -> PoolUsage:
        tokens = sum(len(text.ids) for text in texts)
        return cls(tokens, tokens)


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingList(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Embedding]
    usage: PoolUsage
    object: str = "list"


async def create_embeddings(served: Served, request: Request) -> Response:
    """Vectors of texts, of unit length unless `use_activation` is false."""
    fields, size = await read_request(request, EmbeddingRequest, REFUSED_EMBEDDING)
    model = served.pick(fields.model, ("embed",))
    most = model.capabilities.size
    if fields.dimensions is not None and fields.dimensions > most:
        raise bad("dimensions", f"this model's embeddings have {most}, got {fields.dimensions}")
    texts, numbers = await model.compute_input(fields, request, size)
    answer = await prepare(lambda: _answer(model, fields, texts, numbers), numbers.nbytes)
    return Response(answer, media_type="application/json")


def _answer(
    model: PoolModel, fields: EmbeddingRequest, texts: list[Encoded], numbers: Numbers
) -> bytes:
    """The response, rendered row by row so that a long one lets others run in between."""
    numbers = numbers[:, : fields.dimensions]
    if fields.use_activation:
        numbers = unit(numbers)
    head = msgspec.json.encode(
        {
            "id": f"embd-{uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": model.name,
            "usage": PoolUsage.of(texts),
        }
    )
    return b'%s,"data":[%s]}' % (head[:-1], b",".join(_rows(numbers, fields.encoding_format)))


def _rows(numbers: Numbers, encoding_format: str) -> Iterator[bytes]:
    for index, row in enumerate(numbers):
        if encoding_format == "float":
            values = msgspec.json.encode(row.tolist())
        else:
            values = b'"%s"' % base64.b64encode(row.astype("<f4").tobytes())
        yield b'{"object":"embedding","index":%d,"embedding":%s}' % (index, values)


def unit(numbers: Numbers) -> Numbers:
    """Rows divided by their length, computed in float64; rows of zeros stay as they are."""
    wide = numbers.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return (wide / np.where(lengths > 0, lengths, 1)).astype(np.float32)
