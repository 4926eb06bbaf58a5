"""`POST /score` and `POST /rerank`: how well texts go together, as vLLM, Jina and Cohere ask it.

Cross-encoders read both texts at once. Of embedding models the cosine between two texts counts.
"""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

import msgspec
import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import Response

from app.http.body import read_request
from app.offload import prepare
from app.pooling.embeddings import PoolUsage, unit
from app.pooling.inputs import Encoded, Encoder, Texts, bad, text_list
from app.pooling.model import Numbers, PoolModel
from app.schemas.pooling import REFUSED_RERANK, REFUSED_SCORE, RerankRequest, ScoreRequest
from app.served import Served

Scores = npt.NDArray[np.float64]

_SIDES = (
    ("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"),
)  # fmt: skip


class Score(msgspec.Struct):
    index: int
    score: float
    object: str = "score"


class ScoreList(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Score]
    usage: PoolUsage
    object: str = "list"


class Document(msgspec.Struct):
    text: str


class Ranked(msgspec.Struct, omit_defaults=True):
    index: int
    relevance_score: float
    document: Document | None = None


class Ranking(msgspec.Struct):
    id: str
    model: str
    results: list[Ranked]
    usage: PoolUsage


async def score(served: Served, request: Request) -> Response:
    """One score a pair: one text with each of several, or several with as many, one by one."""
    fields, size = await read_request(request, ScoreRequest, REFUSED_SCORE)
    first, second = _sides(fields)
    model = served.pick(fields.model, ("embed", "classify"), size=1)
    scores, texts = await _score(model, fields, first, second, request, size)
    data = [Score(index, float(value)) for index, value in enumerate(scores)]
    usage = PoolUsage.of(texts)
    return _json(ScoreList(f"score-{uuid4().hex}", int(time.time()), model.name, data, usage))


async def rerank(served: Served, request: Request) -> Response:
    """Documents by how well they answer a query, the best first."""
    fields, size = await read_request(request, RerankRequest, REFUSED_RERANK)
    query = text_list(fields.query, "query")
    documents = text_list([_text_of(item) for item in fields.documents], "documents")
    model = served.pick(fields.model, ("embed", "classify"), size=1)
    scores, texts = await _score(model, fields, query, documents, request, size)
    results = []
    for index in np.argsort(-scores, kind="stable")[: fields.top_n or None]:
        document = Document(documents.values[index]) if fields.return_documents else None
        results.append(Ranked(int(index), float(scores[index]), document))
    return _json(Ranking(f"rerank-{uuid4().hex}", model.name, results, PoolUsage.of(texts)))


def _text_of(item: Any) -> Any:
    """A document may be an object with a text and nothing else."""
    return item["text"] if isinstance(item, dict) and set(item) == {"text"} else item


def _sides(fields: ScoreRequest) -> tuple[Texts, Texts]:
    given = [name for name in dict.fromkeys(sum(_SIDES, ())) if getattr(fields, name) is not None]
    if tuple(given) not in _SIDES:
        pairs = ", or ".join(" and ".join(pair) for pair in _SIDES)
        missing = given[0] if len(given) == 1 else "text_1"
        raise bad(missing, f"two sides are needed: {pairs}")
    first, second = (text_list(getattr(fields, name), name) for name in given)
    if len(first.values) not in (1, len(second.values)):
        raise bad(
            given[0],
            f"there must be one text, or as many as in {given[1]} ({len(second.values)}), "
            f"got {len(first.values)}",
        )
    return first, second


async def _score(
    model: PoolModel,
    fields: ScoreRequest | RerankRequest,
    first: Texts,
    second: Texts,
    request: Request,
    body_bytes: int,
) -> tuple[Scores, list[Encoded]]:
    """A score for each of `second`, and what was read for it."""
    encoder = Encoder.of(model.tokenizer, model.capabilities, fields)
    most = (fields.max_tokens_per_query, fields.max_tokens_per_doc)
    is_cross_encoder = model.capabilities.task == "classify"

    def work() -> list[Encoded]:
        if is_cross_encoder:
            return encoder.pairs(first, second, most)
        return encoder.texts(first, most[0]) + encoder.texts(second, most[1])

    texts = await prepare(work, body_bytes)
    numbers = await model.compute(texts, request)
    if is_cross_encoder:
        logits = numbers[:, 0].astype(np.float64)
        activation = model.capabilities.activation if fields.use_activation else "identity"
        return activate(logits[:, None], activation)[:, 0], texts
    return _cosines(numbers, len(first.values)), texts


def _cosines(numbers: Numbers, firsts: int) -> Scores:
    """Of each of the later rows with its partner among the first ones, or the only one."""
    rows = unit(numbers).astype(np.float64)
    cosines: Scores = (rows[:firsts] * rows[firsts:]).sum(axis=1)
    return cosines


def activate(logits: Scores, activation: str) -> Scores:
    """Probabilities [texts, labels] of a classifier's logits; identity leaves them alone."""
    if activation == "identity":
        return logits
    if activation == "sigmoid":
        return np.where(logits >= 0, 1, np.exp(-np.abs(logits))) / (1 + np.exp(-np.abs(logits)))
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Scores = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
