"""The requests of the endpoints that give numbers: embeddings, rerank, score and classify."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from app.schemas.common import Natural

Truncation = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Texts = str | list[Any]  # checked by `app.pooling.inputs`


class PoolFields(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What all of them understand. Null and absent are the same (`app.http.body` drops nulls)."""

    model: str | None = None
    truncate_prompt_tokens: Truncation | None = None  # -1: what the model takes
    truncation_side: Literal["left", "right"] = "right"
    use_activation: bool = True

    # Accepted without effect
    user: str | None = None
    cache_salt: Annotated[str, Meta(min_length=1)] | None = None


class InputFields(PoolFields, frozen=True, kw_only=True):
    input: Texts  # text, texts, token ids or lists of them
    add_special_tokens: bool = True


class EmbeddingRequest(InputFields, frozen=True, kw_only=True):
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    embed_dtype: Literal["float32"] = "float32"
    endianness: Literal["native", "little"] = "little"


class ClassifyRequest(InputFields, frozen=True, kw_only=True):
    pass


class ScoreRequest(PoolFields, frozen=True, kw_only=True):
    """One of the four pairs of names that vLLM knows for two sides."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None
    max_tokens_per_query: Natural = 0
    max_tokens_per_doc: Natural = 0


class RerankRequest(PoolFields, frozen=True, kw_only=True):
    query: str
    documents: list[Any]  # texts, or objects with a text
    top_n: Natural = 0
    return_documents: bool = True
    max_tokens_per_query: Natural = 0
    max_tokens_per_doc: Natural = 0


INERT = {
    "user": "nothing is stored or billed per user",
    "cache_salt": "nothing is cached",
}

REFUSED_COMMON = {
    "priority": "calls take turns",
    "request_id": "not supported; send an X-Request-Id header",
    "mm_processor_kwargs": "only text is supported",
    "padding": "padding has no effect on the result",
    "normalize": "not supported; use use_activation",
    "activation": "not supported; use use_activation",
    "softmax": "not supported; use use_activation",
}

REFUSED_EMBEDDING = REFUSED_COMMON | {
    "messages": "not supported; send input",
    "chat_template": "not supported; send input",
    "chat_template_kwargs": "not supported; send input",
    "add_generation_prompt": "not supported; send input",
    "continue_final_message": "not supported; send input",
    "bytes_only": "not supported",
}

REFUSED_CLASSIFY = REFUSED_EMBEDDING

REFUSED_SCORE = REFUSED_COMMON | {"score_template": "not supported"}

REFUSED_RERANK = REFUSED_COMMON | {
    "rank_fields": "not supported; send texts",
    "max_chunks_per_doc": "documents are not cut in chunks",
}
