"""Request fields to the engine's `SamplingParams`: defaults of the model, ranges, refusals."""

from __future__ import annotations

import secrets
from pathlib import Path

import msgspec

from app.http.errors import ApiError
from app.inputs.prompts import check_token_ids
from app.inputs.template import read_json
from app.inputs.tokenizer import Tokenizer
from app.schemas.common import GenerationFields
from batching.core.types import Grammar, SamplingParams
from batching.worker.protocol import Capabilities

MAX_STOPS = 4
_SEED_MASK = 2**63 - 1
_MAX_ID_DIGITS = 12


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What the model's `generation_config.json` recommends (as vLLM reads it)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None

    @classmethod
    def load(cls, folder: Path) -> SamplingDefaults:
        config = read_json(folder / "generation_config.json")
        known = {
            name: config[name] for name in cls.__struct_fields__ if config.get(name) is not None
        }
        return msgspec.convert(known, cls)


def resolve_max_tokens(
    asked: int | None, prompt_tokens: int, context: int, *, default: int | None, param: str
) -> int:
    """Tokens to generate: what was asked, or `default` (None: all that fit) cut to the context.

    Raises `ApiError` when prompt and asked tokens do not fit together.
    """
    room = context - prompt_tokens
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise ApiError(
            f"{param}: {prompt_tokens} prompt tokens and {asked} output tokens are more than the "
            f"model's context of {context} tokens",
            param=param,
            code="context_length_exceeded",
        )
    return asked


def stop_strings(stop: str | list[str] | None) -> list[str]:
    """The stop strings of a request. Raises `ApiError` for more than four or an empty one."""
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS:
        raise ApiError(
            f"stop: at most {MAX_STOPS} stop strings, got {len(stops)}",
            param="stop",
            code="invalid_value",
        )
    if not all(stops):
        raise ApiError("stop: a stop string is empty", param="stop", code="invalid_value")
    return stops


def sampling_params(
    fields: GenerationFields,
    tokenizer: Tokenizer,
    capabilities: Capabilities,
    defaults: SamplingDefaults,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """Parameters of the first sample; the others differ by seed (`nth_sample`)."""
    vocab_size = capabilities.vocab_size
    stop_tokens = tuple(fields.stop_token_ids or ())
    allowed = tuple(fields.allowed_token_ids or ())
    check_token_ids(stop_tokens, vocab_size, "stop_token_ids")
    check_token_ids(allowed, vocab_size, "allowed_token_ids")
    if fields.min_tokens > max_tokens:
        raise ApiError(
            f"min_tokens: {fields.min_tokens} is more than the most tokens allowed ({max_tokens})",
            param="min_tokens",
            code="invalid_value",
        )
    if not fields.ignore_eos or grammar is not None:
        stop_tokens = tuple(dict.fromkeys((*capabilities.eos_token_ids, *stop_tokens)))
    if fields.min_tokens and allowed and set(allowed) <= set(stop_tokens):
        raise ApiError(
            "allowed_token_ids: with min_tokens, one must be no end token",
            param="allowed_token_ids",
            code="invalid_value",
        )
    return SamplingParams(
        max_tokens=max(max_tokens, 1),
        temperature=_or(fields.temperature, defaults.temperature),
        # A nucleus of probability 0 still holds the most likely token.
        top_p=max(_or(fields.top_p, defaults.top_p), 1e-9),
        top_k=int(max(_or(fields.top_k, defaults.top_k), 0)),
        min_p=_or(fields.min_p, defaults.min_p),
        seed=(secrets.randbits(63) if fields.seed is None else fields.seed) & _SEED_MASK,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=_or(fields.repetition_penalty, defaults.repetition_penalty),
        logit_bias=_logit_bias(fields.logit_bias or {}, vocab_size),
        allowed_token_ids=allowed,
        bad_words=_bad_words(fields.bad_words or [], tokenizer, vocab_size),
        stop_token_ids=stop_tokens,
        min_tokens=fields.min_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def nth_sample(params: SamplingParams, n: int) -> SamplingParams:
    """The parameters of sample `n` of a prompt: its own seed, repeatable."""
    if n == 0:
        return params
    return msgspec.structs.replace(params, seed=(params.seed + n) & _SEED_MASK)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _bad_words(
    words: list[str], tokenizer: Tokenizer, vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, as it begins a text and, with a space before it, within one.

    vLLM leaves out the second where it has another number of tokens, and lets such words pass.
    Raises `ApiError` for a word that is nothing but white space.
    """
    result: dict[tuple[int, ...], None] = {}
    for i, word in enumerate(words):
        if not (word := word.lstrip()):
            name = f"bad_words[{i}]"
            raise ApiError(f"{name}: there is no word in it", param=name, code="invalid_value")
        for text in (word, f" {word}"):
            tokens = tokenizer.encode(text, add_special_tokens=False, limit=len(text))
            result[tuple(tokens)] = None
    return tuple(tokens for tokens in result if tokens and max(tokens) < vocab_size)


def _logit_bias(bias: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    result = {}
    for name, value in bias.items():
        # Length first: Python refuses to read, and the engine to hold, what a client may write.
        is_id = name.isascii() and name.isdecimal() and len(name) <= _MAX_ID_DIGITS
        if not (is_id and int(name) < vocab_size):
            raise ApiError(
                f"logit_bias: {name[:40]!r} is no token id of this model "
                f"(at least 0 and less than {vocab_size})",
                param="logit_bias",
                code="invalid_value",
            )
        result[int(name)] = value
    return tuple(sorted(result.items()))
