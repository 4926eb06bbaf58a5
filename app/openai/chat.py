"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import uuid4

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from app.http.body import read_request
from app.http.sse import CONTENT, DELTA, Envelope
from app.inputs.chat_turn import ChatTurn
from app.openai.streaming import Chunks
from app.outputs.answer import answer
from app.outputs.choice import Delta
from app.outputs.generation import Collected, Generation
from app.outputs.logprobs import ChatLogprobs, Entry, PromptLogprobs, chat_logprobs, prompt_logprobs
from app.outputs.usage import Usage, usage_of
from app.schemas.chat import REFUSED, ChatRequest
from app.service import Service
from app.telemetry.timings import Timings
from app.turns.parts import CallArguments, CallBegin, Part, Reasoning, Text


class Function(msgspec.Struct):
    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    id: str
    function: Function
    type: str = "function"


class ChatMessage(msgspec.Struct):
    content: str | None
    role: str = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    # The first as most servers name it, the second as vLLM does now.
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class ChatHandler(ChatTurn):
    """The checked request and everything its response is made of."""

    def __init__(self, service: Service, fields: ChatRequest) -> None:
        super().__init__(service, fields)
        self.id = f"chatcmpl-{fields.request_id or uuid4().hex}"
        self.created = int(time.time())

    async def run(self, generation: Generation) -> bytes:
        """The whole response as JSON."""
        choices = [
            ChatChoice(
                index,
                _message(result),
                self.logprobs(result.entries),
                result.finish,
                result.stop_reason,
            )
            for index, result in enumerate(await generation.collect())
        ]
        usage = usage_of(self.jobs, self.fields.n)
        model = self.service.model_name
        answer = ChatCompletion(self.id, self.created, model, choices, usage)
        if (count := self.fields.prompt_logprobs) is not None:
            found = self.jobs[0].choice.prompt_logprobs
            answer.prompt_logprobs = prompt_logprobs(found, self.service.tokenizer, count)
        if self.fields.timings:
            answer.timings = generation.timings()
        if self.fields.return_token_ids:
            answer.prompt_token_ids = self.jobs[0].prompt
            for choice, job in zip(choices, self.jobs, strict=True):
                choice.token_ids = job.choice.token_ids
        return msgspec.json.encode(answer)

    def stream(self, generation: Generation) -> ChatChunks:
        """The response as chunks."""
        return ChatChunks(self, generation)

    def logprobs(self, entries: Sequence[Entry]) -> ChatLogprobs | None:
        """In the API's shape, if they are wanted."""
        if not self.fields.logprobs:
            return None
        return chat_logprobs(
            entries,
            self.service.tokenizer,
            self.fields.top_logprobs or 0,
            hidden=self.hidden_tokens,
            as_ids=self.fields.return_tokens_as_token_ids,
        )


class ChatChunks(Chunks):
    """A streamed chat. A choice's role comes in the same write as its first token."""

    def __init__(self, handler: ChatHandler, generation: Generation) -> None:
        fields, jobs = handler.fields, handler.jobs
        envelope = Envelope(
            id=handler.id,
            object="chat.completion.chunk",
            created=handler.created,
            model=handler.service.model_name,
            choices=len(jobs),
            around=DELTA if handler.apart else CONTENT,
        )
        super().__init__(fields, generation, envelope)
        self._handler = handler
        self._is_plain = not (fields.logprobs or fields.return_token_ids)
        self._silent = set(range(len(jobs)))
        self._held: list[list[Entry]] = [[] for _ in jobs]  # logprobs whose parts are to come

    def piece(self, index: int, delta: Delta) -> bytes:
        """Chunks, unless there is no news."""
        role = b""
        if index in self._silent:
            self._silent.discard(index)
            role = self._envelope.role(index, self._usage.suffix() + self._ids.prompt(index))
        if self._handler.apart:
            return role + b"".join(self._parts(index, delta))
        text, entries, finish, stop_reason, _ = delta
        if not (text or entries or finish):
            return role
        if self._is_plain and not finish:
            return role + self._envelope.text(index, text, self._usage.suffix())
        return role + self._envelope.delta(
            index,
            text,
            self._usage.suffix(),
            logprobs=self._handler.logprobs(entries),
            finish=finish,
            stop_reason=stop_reason,
            more=self._ids.news(index),
        )

    def _parts(self, index: int, delta: Delta) -> Iterable[bytes]:
        """A chunk for each part; the last has what is of all: logprobs, the held ones first."""
        held = self._held[index]
        held += delta.entries
        news: list[dict[str, Any]] = [_delta(part) for part in delta.parts]
        if delta.finish and not news:
            news = [{}]
        for i, new in enumerate(news):
            logprobs, finish, more = None, None, b""
            if i == len(news) - 1:
                finish, more = delta.finish, self._ids.news(index)
                if held:
                    logprobs = self._handler.logprobs(held)
                    held.clear()
            yield self._envelope.delta(
                index,
                new,
                self._usage.suffix(),
                logprobs=logprobs,
                finish=finish,
                stop_reason=delta.stop_reason,
                more=more,
            )


def _message(result: Collected) -> ChatMessage:
    turn = result.turn
    message = ChatMessage(turn.text)
    if turn.calls:
        message.tool_calls = [ToolCall(c.id, Function(c.name, c.arguments)) for c in turn.calls]
    if turn.reasoning:
        message.reasoning_content = message.reasoning = turn.reasoning
    if not turn.text and (turn.calls or turn.reasoning):
        message.content = None
    return message


def _delta(part: Part) -> dict[str, Any]:
    """A part as the `delta` of a chunk."""
    match part:
        case Text(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text, "reasoning": text}
        case CallBegin(index, id, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": id, "type": "function", "function": function}
        case CallArguments(index, text):
            call = {"index": index, "function": {"arguments": text}}
    return {"tool_calls": [call]}


async def create_chat_completion(service: Service, request: Request) -> Response:
    """Answer one request."""
    fields, size = await read_request(request, ChatRequest, REFUSED)
    service.check_model(fields.model)
    handler = ChatHandler(service, fields)
    return await answer(service, request, fields, handler, samples=fields.n, body_bytes=size)
