"""`POST /tokenize` and `POST /detokenize`: what a text or a chat is to the model."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from app.http.body import read_request
from app.http.errors import ApiError
from app.inputs.chat_prompt import check_prompt_fields, render_chat
from app.inputs.prompts import check_token_ids
from app.offload import prepare
from app.schemas.tokenization import REFUSED_BY_TOKENIZE, DetokenizeRequest, TokenizeRequest
from app.service import Service


class Tokenized(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None  # as the vocabulary spells them


class Detokenized(msgspec.Struct):
    prompt: str


def check(fields: TokenizeRequest) -> None:
    """Raises `ApiError` unless there is one thing to tokenise."""
    if fields.prompt is None and fields.messages is None:
        raise ApiError("prompt or messages is required", param="prompt", code="missing_parameter")
    if fields.prompt is not None and fields.messages is not None:
        raise ApiError(
            "messages: not allowed beside prompt", param="messages", code="invalid_value"
        )
    check_prompt_fields(fields)


async def tokenize(service: Service, request: Request) -> Response:
    """Token ids of a text or a chat, however long: that it fits the model is not asked."""
    fields, size = await read_request(request, TokenizeRequest, REFUSED_BY_TOKENIZE)
    service.check_model(fields.model)
    check(fields)

    def work() -> Response:
        text = render_chat(service, fields) if fields.prompt is None else fields.prompt
        special = fields.add_special_tokens
        if special is None:
            special = fields.messages is None
        ids = service.tokenizer.encode(text, add_special_tokens=special, limit=len(text))
        names = list(map(service.tokenizer.token_name, ids)) if fields.return_token_strs else None
        limit = service.capabilities.max_model_len
        return _json(Tokenized(len(ids), limit, ids, names))

    return await prepare(work, size)


async def detokenize(service: Service, request: Request) -> Response:
    """The text of token ids, special tokens included."""
    fields, size = await read_request(request, DetokenizeRequest, {})
    service.check_model(fields.model)
    check_token_ids(fields.tokens, service.capabilities.vocab_size, "tokens")

    def work() -> Response:
        return _json(
            Detokenized(service.tokenizer.decode(fields.tokens, skip_special_tokens=False))
        )

    return await prepare(work, size)


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
