"""The fields that completions and chat completions share, with their types and ranges."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Natural = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
# It becomes a header: visible ASCII, and nothing behind it (`$` would let a line break pass).
RequestId = Annotated[str, Meta(pattern=r"^[!-~]{1,200}(?![\s\S])")]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # inert: nothing is ever padded


class JsonSchemaFormat(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`strict` changes nothing: the schema is always kept."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
    schema: Any = None  # checked by `app.structured.schema`
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


Choices = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)]
Pattern = Annotated[str, Meta(min_length=1)]
BadWord = Annotated[str, Meta(min_length=1, max_length=256)]


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """vLLM's newer name for the `guided_…` fields."""

    json: Any = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None


class SamplingFields(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What every endpoint that generates understands, in the same words.

    Null and absent are the same (`app.http.body` drops nulls).
    """

    model: str | None = None
    stream: bool = False

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0: off
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: dict[str, Bias] | None = None
    allowed_token_ids: Annotated[list[int], Meta(min_length=1)] | None = None
    bad_words: Annotated[list[BadWord], Meta(max_length=256)] | None = None

    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Natural = 0
    skip_special_tokens: bool = True
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    truncation_side: Literal["left", "right"] = "left"
    request_id: RequestId | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    cache_salt: Annotated[str, Meta(min_length=1)] | None = None


class GenerationFields(SamplingFields, frozen=True, kw_only=True):
    """What completions and chat completions share beyond that."""

    max_tokens: Natural | None = None
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    return_token_ids: bool = False
    timings: bool = False

    response_format: ResponseFormat | None = None
    guided_json: Any = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None
    structured_outputs: StructuredOutputs | None = None

    # Accepted without effect
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    spaces_between_special_tokens: bool | None = None


INERT_COMMON = {
    "user": "nothing is stored or billed per user",
    "metadata": "nothing is stored",
    "store": "nothing is stored",
    "service_tier": "there is one tier",
    "safety_identifier": "nothing is stored",
    "prompt_cache_key": "prefix caching is automatic",
    "prompt_cache_retention": "prefix caching is automatic",
    "prompt_cache_options": "prefix caching is automatic",
    "spaces_between_special_tokens": "fast tokenizers never add such spaces",
}

REFUSED_COMMON = {
    "use_beam_search": "beam search is not supported",
    "length_penalty": "beam search is not supported",
    "early_stopping": "beam search is not supported",
    "logits_processors": "not supported",
    "kv_transfer_params": "not supported",
    "vllm_xargs": "not supported",
    "guided_decoding_backend": "not supported; there is one backend",
    "guided_whitespace_pattern": "not supported; at most one space follows a comma or colon",
}
