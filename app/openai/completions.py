"""`POST /v1/completions`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from app.http.body import read_request
from app.http.errors import ApiError
from app.http.sse import TEXT, Envelope
from app.inputs.prompts import Prompt, split_prompts, tokenize
from app.inputs.sampling import nth_sample, resolve_max_tokens, sampling_params, stop_strings
from app.inputs.tokenizer import TextDecoder, Tokenizer
from app.openai.streaming import Chunks, check_stream_options
from app.outputs.answer import answer
from app.outputs.choice import Choice, Delta
from app.outputs.generation import Generation, Job
from app.outputs.logprobs import (
    CompletionLogprobs,
    Entry,
    PromptLogprobs,
    completion_logprobs,
    prompt_logprobs,
)
from app.outputs.usage import Usage, usage_of
from app.schemas.completions import REFUSED, CompletionRequest
from app.service import Service
from app.structured.request import RequestedGrammar, requested_grammar
from app.telemetry.timings import Timings

DEFAULT_MAX_TOKENS = 16


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    object: str = "text_completion"
    timings: Timings | msgspec.UnsetType = msgspec.UNSET


class Echo:
    """A prompt as the beginning of its choices' text."""

    def __init__(self, prompt: Prompt, ids: list[int], tokenizer: Tokenizer, skip: bool) -> None:
        self.text = (
            prompt if isinstance(prompt, str) else tokenizer.decode(ids, skip_special_tokens=skip)
        )
        self._ids = ids
        self._decoder = TextDecoder(tokenizer, (), skip_special_tokens=skip)

    def entries(self, choice: Choice, count: int) -> list[Entry]:
        """One entry per prompt token with `count` likeliest; nothing predicts the first."""
        result, offset = [], 0
        found = [
            msgspec.structs.replace(logprobs, top=logprobs.top[:count])
            for logprobs in choice.prompt_logprobs
        ]
        for token, logprobs in zip(self._ids, [None, *found], strict=True):
            result.append(Entry(min(offset, len(self.text)), token, logprobs))
            offset += len(self._decoder.feed((token,)))
        return result


class CompletionHandler:
    """The checked request and everything its response is made of."""

    def __init__(self, service: Service, fields: CompletionRequest) -> None:
        self.service = service
        self.fields = fields
        self.samples = fields.best_of or fields.n
        self.echoes: list[Echo] = []
        self.jobs: list[Job] = []
        self.grammar: RequestedGrammar | None = None
        self.id = f"cmpl-{fields.request_id or uuid4().hex}"
        self.created = int(time.time())

    def prepare(self) -> None:
        """Tokenise the prompts and lay out the jobs: choice = prompt · n + sample."""
        fields, service = self.fields, self.service
        stops = stop_strings(fields.stop)
        self.grammar = requested_grammar(fields)
        prompts = split_prompts(fields.prompt)
        # Before anything is made for each: a body of 16 MiB can ask for 500 million.
        service.admission.check_count(len(prompts) * self.samples)
        wanted = DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
        for i, prompt in enumerate(prompts):
            param = "prompt" if len(prompts) == 1 else f"prompt[{i}]"
            ids = tokenize(prompt, service, fields, max_tokens=wanted, param=param)
            self._add_jobs(prompt, ids, stops)

    def _add_jobs(self, prompt: Prompt, ids: list[int], stops: list[str]) -> None:
        fields, service = self.fields, self.service
        tokenizer = service.tokenizer
        max_tokens = resolve_max_tokens(
            fields.max_tokens,
            len(ids),
            service.context,
            default=DEFAULT_MAX_TOKENS,
            param="max_tokens",
        )
        wants_score = self.samples > fields.n and fields.logprobs is None
        params = sampling_params(
            fields,
            service.tokenizer,
            service.capabilities,
            service.defaults,
            max_tokens=max_tokens,
            logprobs=0 if wants_score else fields.logprobs,
            prompt_logprobs=self._prompt_logprobs(),
            grammar=self.grammar.grammar if self.grammar else None,
        )
        echo = Echo(prompt, ids, tokenizer, fields.skip_special_tokens)
        for n in range(self.samples):
            choice = Choice(
                tokenizer,
                ids,
                stops=stops,
                include_stop=fields.include_stop_str_in_output,
                skip_special_tokens=fields.skip_special_tokens,
                eos_token_ids=service.capabilities.eos_token_ids,
                logprobs=fields.logprobs is not None,
                discard=max_tokens == 0,
                offset=len(echo.text) if fields.echo else 0,
            )
            self.echoes.append(echo)
            self.jobs.append(Job(ids, nth_sample(params, n), choice))

    def _prompt_logprobs(self) -> int | None:
        echoed = self.fields.logprobs if self.fields.echo else None
        asked = [n for n in (echoed, self.fields.prompt_logprobs) if n is not None]
        return max(asked, default=None)

    async def run(self, generation: Generation) -> bytes:
        """The whole response as JSON."""
        results = await generation.collect()
        choices: list[CompletionChoice] = []
        for index in self._best():
            result = results[index]
            text, entries = self.with_echo(index, result.text, result.entries)
            finish = self.jobs[index].choice.finish
            logprobs = self.logprobs(entries)
            choice = CompletionChoice(len(choices), text, logprobs, finish, result.stop_reason)
            if (count := self.fields.prompt_logprobs) is not None:
                found = self.jobs[index].choice.prompt_logprobs
                choice.prompt_logprobs = prompt_logprobs(found, self.service.tokenizer, count)
            if self.fields.return_token_ids:
                choice.token_ids = self.jobs[index].choice.token_ids
                choice.prompt_token_ids = self.jobs[index].prompt
            choices.append(choice)
        usage = usage_of(self.jobs, self.samples)
        model = self.service.model_name
        answer = Completion(self.id, self.created, model, choices, usage)
        if self.fields.timings:
            answer.timings = generation.timings()
        return msgspec.json.encode(answer)

    def _best(self) -> list[int]:
        """Job indices of the choices to return: of each prompt the n likeliest per token."""
        indices = list(range(len(self.jobs)))
        if self.samples == self.fields.n:
            return indices

        def score(index: int) -> float:
            choice = self.jobs[index].choice
            return -choice.logprob_sum / max(choice.tokens, 1)

        groups = [indices[i : i + self.samples] for i in range(0, len(indices), self.samples)]
        return [i for group in groups for i in sorted(group, key=score)[: self.fields.n]]

    def stream(self, generation: Generation) -> CompletionChunks:
        """The response as chunks."""
        return CompletionChunks(self, generation)

    def with_echo(self, index: int, text: str, entries: list[Entry]) -> tuple[str, list[Entry]]:
        """A choice's text and logprobs from its beginning, an echoed prompt included."""
        if not self.fields.echo:
            return text, entries
        echo = self.echoes[index]
        if self.fields.logprobs is not None:
            entries = echo.entries(self.jobs[index].choice, self.fields.logprobs) + entries
        return echo.text + text, entries

    def logprobs(self, entries: Sequence[Entry]) -> CompletionLogprobs | None:
        """In the API's shape, if they are wanted."""
        if self.fields.logprobs is None:
            return None
        as_ids = self.fields.return_tokens_as_token_ids
        return completion_logprobs(entries, self.service.tokenizer, as_ids=as_ids)


class CompletionChunks(Chunks):
    """A streamed completion; an echoed prompt comes with a choice's first chunk."""

    def __init__(self, handler: CompletionHandler, generation: Generation) -> None:
        fields, self._jobs = handler.fields, handler.jobs
        envelope = Envelope(
            id=handler.id,
            object="text_completion",
            created=handler.created,
            model=handler.service.model_name,
            choices=len(self._jobs),
            around=TEXT,
        )
        super().__init__(fields, generation, envelope)
        self._handler = handler
        self._is_plain = fields.logprobs is None and not fields.return_token_ids
        self._unsent = set(range(len(self._jobs)))

    def piece(self, index: int, delta: Delta) -> bytes:
        """A chunk, unless there is no news."""
        text, entries, finish, stop_reason, _ = delta
        is_first = index in self._unsent
        if self._is_plain and not (is_first or finish):
            return self._envelope.text(index, text, self._usage.suffix()) if text else b""
        if is_first:
            if not self._jobs[index].choice.tokens and finish is None:
                return b""  # the prompt's logprobs are still coming
            text, entries = self._handler.with_echo(index, text, list(entries))
        if not (text or entries or finish):
            return b""
        more = self._ids.news(index)
        if is_first:
            self._unsent.discard(index)
            more += self._ids.prompt(index)
        return self._envelope.delta(
            index,
            text,
            self._usage.suffix(),
            logprobs=self._handler.logprobs(entries),
            finish=finish,
            stop_reason=stop_reason,
            more=more,
        )


def check(fields: CompletionRequest) -> None:
    """Combinations that make no sense. Raises `ApiError`."""
    check_stream_options(fields)
    if fields.best_of is not None and fields.best_of < fields.n:
        raise ApiError("best_of: must be at least n", param="best_of", code="invalid_value")
    if fields.stream and (fields.best_of or 1) > 1:
        raise ApiError(
            "best_of: cannot be streamed",
            param="best_of",
            code="invalid_value",
        )
    if fields.max_tokens == 0 and not fields.echo:
        raise ApiError(
            "max_tokens: must be at least 1 unless echo is set",
            param="max_tokens",
            code="invalid_value",
        )


async def create_completion(service: Service, request: Request) -> Response:
    """Answer one request."""
    fields, size = await read_request(request, CompletionRequest, REFUSED)
    service.check_model(fields.model)
    check(fields)
    handler = CompletionHandler(service, fields)
    return await answer(service, request, fields, handler, samples=handler.samples, body_bytes=size)
