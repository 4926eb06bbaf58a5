"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import TypeVar
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from app.anthropic.errors import error_body
from app.anthropic.message import Content, Event, Message, MessageUsage
from app.anthropic.request import asks_to_cache, chat_request, own_name
from app.http.body import read_request
from app.http.errors import ApiError, renamed
from app.http.sse import StreamEnd, event_bytes
from app.inputs.chat_turn import ChatTurn
from app.offload import prepare
from app.outputs.answer import answer
from app.outputs.choice import Delta
from app.outputs.generation import Generation
from app.schemas.messages import REFUSED, CountTokensRequest, MessagesRequest
from app.service import Service
from app.structured.request import RequestedGrammar

Fields = TypeVar("Fields", bound=CountTokensRequest)

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class TokenCount(msgspec.Struct):
    input_tokens: int


class MessagesHandler:
    """One message from its checked request to its last event."""

    def __init__(self, service: Service, fields: CountTokensRequest) -> None:
        """Raises `ApiError`."""
        with renamed(own_name):
            self._turn = ChatTurn(service, chat_request(fields))
        self.jobs = self._turn.jobs
        self.grammar: RequestedGrammar | None = None
        self._model = service.model_name
        self._counts_cached = asks_to_cache(fields)
        self._content = Content()
        self.id = f"msg_{uuid4().hex}"
        self._begun = False
        self._finish: str | None = None
        self._stop: str | int | None = None

    def prepare(self) -> None:
        with renamed(own_name):
            self._turn.prepare()
        if (grammar := self._turn.grammar) is not None:
            self.grammar = grammar._replace(param=own_name(grammar.param))

    async def run(self, generation: Generation) -> bytes:
        """The whole message as JSON."""
        await generation.follow(lambda _, delta: deque(self._events(delta), maxlen=0))
        deque(self._content.finish(), maxlen=0)
        return msgspec.json.encode(self._message())

    def stream(self, generation: Generation) -> MessagesHandler:
        """Itself."""
        return self

    def piece(self, index: int, delta: Delta) -> bytes:
        """Events. The first ones come with the first token: what fails before is an HTTP error."""
        begin = b""
        if not self._begun:
            self._begun = True
            start = {"type": "message_start", "message": self._message(0)}
            begin = _write(iter((start, {"type": "ping"})))
        return begin + _write(self._events(delta))

    async def last(self) -> bytes:
        """The events that end the content and the message."""
        end = self._message()
        change = {"stop_reason": end.stop_reason, "stop_sequence": end.stop_sequence}
        last = {"type": "message_delta", "delta": change, "usage": end.usage}
        return _write(chain(self._content.finish(), (last, {"type": "message_stop"})))

    def _events(self, delta: Delta) -> Iterator[Event]:
        for part in delta.news:
            yield from self._content.feed(part)
        if delta.finish is not None:
            self._finish, self._stop = delta.finish, delta.stop_reason

    def _message(self, output_tokens: int | None = None) -> Message:
        """As it is now. `output_tokens`: by default those counted so far."""
        (job,) = self.jobs
        count = job.choice.tokens if output_tokens is None else output_tokens
        reason = self._stop_reason()
        # Who did not ask for caching, reads of all tokens that they count: as with Anthropic.
        cached = job.choice.cached_tokens if self._counts_cached else 0
        return Message(
            id=self.id,
            model=self._model,
            content=self._content.blocks,
            stop_reason=reason,
            stop_sequence=str(self._stop) if reason == "stop_sequence" else None,
            usage=MessageUsage(len(job.prompt) - cached, count, cached),
        )

    def _stop_reason(self) -> str | None:
        if self._finish is None:
            return None
        if isinstance(self._stop, str):
            return "stop_sequence"
        if self._finish != "length" and self._content.called:
            return "tool_use"
        return _STOP_REASONS[self._finish]


async def create_message(service: Service, request: Request) -> Response:
    """Generate a message."""
    fields, size = await _read(service, request, MessagesRequest)
    request_id = request.state.request_id

    def failed(error: ApiError) -> bytes:
        return b"event: error\ndata: " + error_body(error, request_id) + b"\n\n"

    return await answer(
        service,
        request,
        fields,
        MessagesHandler(service, fields),
        samples=1,
        body_bytes=size,
        ending=StreamEnd(b"", failed),
    )


async def count_tokens(service: Service, request: Request) -> Response:
    """How many tokens the prompt of such a message has."""
    fields, size = await _read(service, request, CountTokensRequest)
    handler = MessagesHandler(service, fields)
    await prepare(handler.prepare, size)
    count = TokenCount(len(handler.jobs[0].prompt))
    return Response(msgspec.json.encode(count), media_type="application/json")


async def _read(service: Service, request: Request, schema: type[Fields]) -> tuple[Fields, int]:
    fields, size = await read_request(request, schema, REFUSED)
    service.check_model(fields.model)
    return fields, size


def _write(events: Iterator[Event]) -> bytes:
    return b"".join(event_bytes(event["type"], event) for event in events)
