"""One response from its checked request to its last event."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from app.http.errors import ApiError, renamed
from app.http.sse import StreamEnd, event_bytes
from app.inputs.chat_turn import ChatTurn
from app.outputs.choice import Delta
from app.outputs.generation import Generation
from app.outputs.logprobs import ChatToken, chat_logprobs
from app.outputs.usage import usage_of
from app.responses.items import Item, new_id
from app.responses.objects import IncompleteDetails, ResponseError, ResponseUsage
from app.responses.output import Event, Output
from app.responses.request import chat_request, new_response, own_name
from app.responses.store import ResponseStore, Stored
from app.schemas.responses import ResponsesRequest
from app.service import Service
from app.structured.request import RequestedGrammar
from app.turns.parts import Text


class ResponsesHandler:
    """The chat turn of a response, its output as it grows, and the object that sums it up."""

    def __init__(
        self,
        service: Service,
        fields: ResponsesRequest,
        items: list[Item],
        store: ResponseStore | None,
        owner: str,
    ) -> None:
        """`items` are the whole context; with `store` they are kept, too. Raises `ApiError`."""
        with renamed(own_name):
            self.turn = ChatTurn(service, chat_request(fields, items))
        self.jobs = self.turn.jobs
        self.grammar: RequestedGrammar | None = None
        self._input = b"" if store is None else msgspec.json.encode(items)
        self._store = store
        self._owner = owner
        self._tokenizer = service.tokenizer
        self._output = Output()
        self._sequence = 0
        self.id = new_id("resp")
        self._response = new_response(service, fields, self.id, int(time.time()))

    def prepare(self) -> None:
        with renamed(own_name):
            self.turn.prepare()
        if (grammar := self.turn.grammar) is not None:
            self.grammar = grammar._replace(param=own_name(grammar.param))

    async def run(self, generation: Generation) -> bytes:
        """The whole response as JSON."""
        await generation.follow(lambda _, delta: deque(self._events(delta), maxlen=0))
        deque(self._output.finish(self._status), maxlen=0)
        await self._complete()
        return msgspec.json.encode(self._response)

    def stream(self, generation: Generation) -> ResponsesHandler:
        """Itself."""
        return self

    def piece(self, index: int, delta: Delta) -> bytes:
        """Events. The first ones come with the first token: what fails before is an HTTP error."""
        begin = b"" if self._sequence else self._state("created") + self._state("in_progress")
        return begin + self._write(self._events(delta))

    async def last(self) -> bytes:
        """The events that end the output and the response."""
        piece = self._write(self._output.finish(self._status))
        await self._complete()
        return piece + self._state(self._status)

    @property
    def ending(self) -> StreamEnd:
        """No [DONE]: the last event says how it ended."""
        return StreamEnd(b"", self._failed)

    def _failed(self, error: ApiError) -> bytes:
        self._response.status = "failed"
        self._response.error = ResponseError("server_error", error.message)
        self._response.output = self._output.items
        return self._state("failed")

    def _events(self, delta: Delta) -> Iterator[Event]:
        logprobs = self._logprobs(delta.entries)
        for part in delta.news:
            is_text = isinstance(part, Text)
            yield from self._output.feed(part, logprobs if is_text else [])
            logprobs = [] if is_text else logprobs

    @property
    def _status(self) -> str:
        """How the response ends."""
        return "incomplete" if self.jobs[0].choice.finish == "length" else "completed"

    async def _complete(self) -> None:
        response = self._response
        status = response.status = self._status
        response.completed_at = int(time.time())
        response.output = self._output.items
        if status == "incomplete":
            response.incomplete_details = IncompleteDetails("max_output_tokens")
            response.completed_at = None
        reasoning = self.jobs[0].choice.reasoning_tokens or 0
        response.usage = ResponseUsage.of(usage_of(self.jobs, 1), reasoning)
        if self._store is not None:
            stored = Stored(msgspec.json.encode(response), self._input)
            await self._store.put(response.id, self._owner, stored, time.time())

    def _state(self, name: str) -> bytes:
        """An event with the response as it is now."""
        return self._write([{"type": f"response.{name}", "response": self._response}])

    def _write(self, events: Iterable[Event]) -> bytes:
        """Events as bytes, numbered."""
        written = []
        for event in events:
            event["sequence_number"] = self._sequence
            self._sequence += 1
            written.append(event_bytes(event["type"], event))
        return b"".join(written)

    def _logprobs(self, entries: Any) -> list[ChatToken]:
        fields = self.turn.fields
        if not fields.logprobs:
            return []
        return chat_logprobs(
            entries,
            self._tokenizer,
            fields.top_logprobs or 0,
            hidden=self.turn.hidden_tokens,
            as_ids=fields.return_tokens_as_token_ids,
        ).content
