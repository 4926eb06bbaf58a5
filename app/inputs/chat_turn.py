"""A chat request up to its generation: what every endpoint that answers a chat begins with.

The endpoints differ in the shape of request and response. All make a `ChatRequest` of theirs, and
from the generation all take `Delta.news`, or `Collected.turn`: the parts of the model's turn.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from app.http.errors import ApiError
from app.inputs.chat_prompt import check_prompt_fields, render_chat
from app.inputs.prompts import tokenize
from app.inputs.sampling import nth_sample, resolve_max_tokens, sampling_params, stop_strings
from app.inputs.tools import tool_use
from app.openai.streaming import check_stream_options
from app.outputs.choice import Choice
from app.outputs.generation import Job
from app.schemas.chat import ChatRequest
from app.service import Service
from app.structured.request import RequestedGrammar, requested_grammar
from app.turns.choice import TurnChoice
from app.turns.grammar import turn_grammar


class ChatTurn:
    """A checked request and its jobs, one per choice, which `prepare` lays out."""

    def __init__(self, service: Service, fields: ChatRequest) -> None:
        """Raises `ApiError`."""
        check(fields)
        self.service = service
        self.fields = fields
        self.use = tool_use(fields)
        self.jobs: list[Job] = []
        self.grammar: RequestedGrammar | None = None
        self.apart = False  # deltas carry parts, not text

    def prepare(self) -> None:
        """Render and tokenise the messages and lay out the jobs. Raises `ApiError`."""
        fields, service = self.fields, self.service
        prompt = render_chat(service, fields, self.use.shown)
        asked = requested_grammar(fields)
        self.grammar = turn_grammar(
            service.style, service.tokenizer, self.use, prompt, asked, to_the_end=fields.ignore_eos
        )
        wanted = fields.max_completion_tokens or fields.max_tokens
        ids = tokenize(prompt, service, fields, max_tokens=wanted, param="messages")
        params = sampling_params(
            fields,
            service.tokenizer,
            service.capabilities,
            service.defaults,
            max_tokens=self._max_tokens(len(ids)),
            logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
            prompt_logprobs=fields.prompt_logprobs,
            grammar=self.grammar.grammar if self.grammar else None,
        )
        for n in range(fields.n):
            choice = self._choice(prompt, ids, has_answer=asked is not None)
            self.jobs.append(Job(ids, nth_sample(params, n), choice))

    @property
    def hidden_tokens(self) -> Container[int]:
        """Tokens that are never in the text."""
        return self.service.tokenizer.special_tokens if self.fields.skip_special_tokens else ()

    def _choice(self, prompt: str, ids: list[int], *, has_answer: bool) -> Choice:
        fields, service, use = self.fields, self.service, self.use
        options: dict[str, Any] = {
            "stops": stop_strings(fields.stop),
            "include_stop": fields.include_stop_str_in_output,
            "skip_special_tokens": fields.skip_special_tokens,
            "eos_token_ids": service.capabilities.eos_token_ids,
            "logprobs": fields.logprobs,
        }
        reader = service.style.reader(prompt, use, has_answer=has_answer)
        if reader is None:
            return Choice(service.tokenizer, ids, **options)
        parser, hidden = reader
        self.apart = True
        return TurnChoice(
            service.tokenizer,
            ids,
            parser,
            hidden=hidden,
            counts_reasoning=service.style.reasons,
            show_reasoning=fields.include_reasoning,
            # As OpenAI: who names the function need not be told that it was called.
            calls_finish="stop" if use.named else "tool_calls",
            **options,
        )

    def _max_tokens(self, prompt_tokens: int) -> int:
        newer = self.fields.max_completion_tokens
        return resolve_max_tokens(
            self.fields.max_tokens if newer is None else newer,
            prompt_tokens,
            self.service.context,
            default=self.service.defaults.max_new_tokens,
            param="max_tokens" if newer is None else "max_completion_tokens",
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


def _bad(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(f"{param}: {message}", param=param, code=code)
