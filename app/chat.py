"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from app.answer import answer
from app.body import parse_request, read_body
from app.chat_prompt import check_prompt_fields, render_chat
from app.choice import Choice
from app.errors import ApiError
from app.generation import Generation, Job
from app.logprobs import ChatLogprobs, PromptLogprobs, chat_logprobs, prompt_logprobs
from app.prompts import kept_tokens, tokenize
from app.sampling import nth_sample, resolve_max_tokens, sampling_params, stop_strings
from app.schemas.chat import REFUSED, ChatRequest
from app.service import Service
from app.sse import Envelope
from app.streaming import UsageOption, check_stream_options
from app.usage import Usage, usage_of


class ChatMessage(msgspec.Struct):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class ChatHandler:
    """The checked request and everything its response is made of."""

    def __init__(self, service: Service, fields: ChatRequest) -> None:
        self.service = service
        self.fields = fields
        self.jobs: list[Job] = []
        self.id = f"chatcmpl-{fields.request_id or uuid4().hex}"
        self.created = int(time.time())

    def prepare(self) -> None:
        """Render and tokenise the messages and lay out one job per choice."""
        fields, service = self.fields, self.service
        stops = stop_strings(fields.stop)
        ids = tokenize(
            render_chat(service, fields),
            service.tokenizer,
            vocab_size=service.capabilities.vocab_size,
            limit=service.prompt_limit,
            add_special_tokens=fields.add_special_tokens,
            param="messages",
            keep_last=kept_tokens(
                fields.truncate_prompt_tokens,
                fields.max_completion_tokens or fields.max_tokens,
                service.context,
            ),
        )
        params = sampling_params(
            fields,
            service.capabilities,
            service.defaults,
            max_tokens=self._max_tokens(len(ids)),
            logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
            prompt_logprobs=fields.prompt_logprobs,
        )
        for n in range(fields.n):
            choice = Choice(
                service.tokenizer,
                ids,
                stops=stops,
                include_stop=fields.include_stop_str_in_output,
                skip_special_tokens=fields.skip_special_tokens,
                eos_token_ids=service.capabilities.eos_token_ids,
                logprobs=fields.logprobs,
            )
            self.jobs.append(Job(ids, nth_sample(params, n), choice))

    def _max_tokens(self, prompt_tokens: int) -> int:
        newer = self.fields.max_completion_tokens
        return resolve_max_tokens(
            self.fields.max_tokens if newer is None else newer,
            prompt_tokens,
            self.service.context,
            default=self.service.defaults.max_new_tokens,
            param="max_tokens" if newer is None else "max_completion_tokens",
        )

    async def run(self, generation: Generation) -> bytes:
        """The whole response as JSON."""
        choices = [
            ChatChoice(
                index,
                ChatMessage(result.text),
                self._logprobs(result.entries),
                self.jobs[index].choice.finish,
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
        return msgspec.json.encode(answer)

    async def stream(self, generation: Generation) -> AsyncGenerator[bytes]:
        """Chunks. A choice's role comes in the same write as its first token."""
        envelope = Envelope(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.service.model_name,
            choices=len(self.jobs),
            chat=True,
        )
        usage = UsageOption(self.fields.stream_options, self.jobs, self.fields.n)
        silent = set(range(len(self.jobs)))
        async with aclosing(generation.deltas()) as deltas:
            async for index, (text, entries, finish, stop_reason) in deltas:
                piece = b""
                if silent and index in silent:
                    silent.discard(index)
                    piece = envelope.role(index, usage.suffix())
                if text or entries or finish:
                    piece += envelope.delta(
                        index,
                        text,
                        usage.suffix(),
                        logprobs=self._logprobs(entries),
                        finish=finish,
                        stop_reason=stop_reason,
                    )
                if piece:
                    yield piece
        if usage.include:
            yield envelope.usage(usage.final())

    def _logprobs(self, entries: Any) -> ChatLogprobs | None:
        if not self.fields.logprobs:
            return None
        return chat_logprobs(
            entries,
            self.service.tokenizer,
            self.fields.top_logprobs or 0,
            as_ids=self.fields.return_tokens_as_token_ids,
        )


def check(fields: ChatRequest) -> None:
    """Combinations that make no sense or are not supported. Raises `ApiError`."""
    check_stream_options(fields)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise _bad("top_logprobs", "only allowed when logprobs is true")
    check_prompt_fields(fields)
    if 0 in (fields.max_tokens, fields.max_completion_tokens):
        name = "max_tokens" if fields.max_tokens == 0 else "max_completion_tokens"
        raise _bad(name, "must be at least 1")
    if fields.response_format is not None and fields.response_format.type != "text":
        raise _bad("response_format", "only type text is supported", "unsupported_parameter")
    _check_tools(fields)


def _check_tools(fields: ChatRequest) -> None:
    choice = fields.tool_choice
    if not fields.tools:
        if choice not in (None, "none", "auto"):
            raise _bad("tool_choice", "only none and auto are allowed without tools")
        return
    if choice != "none":
        raise _bad(
            "tool_choice",
            "parsing tool calls is not supported; with tool_choice none the tools reach the "
            "model and its text is returned as it is",
            "unsupported_parameter",
        )


def _bad(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(f"{param}: {message}", param=param, code=code)


async def create_chat_completion(service: Service, request: Request) -> Response:
    """Answer one request."""
    body = await read_body(request, service.settings.max_body_bytes)
    fields = parse_request(body, ChatRequest, REFUSED)
    service.check_model(fields.model)
    check(fields)
    handler = ChatHandler(service, fields)
    return await answer(service, request, fields, handler, samples=fields.n, body_bytes=len(body))
