"""Token counts of a response, as OpenAI names them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET, UnsetType

if TYPE_CHECKING:
    from app.outputs.generation import Job


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET  # of models that reason


def usage_of(jobs: Iterable[Job], samples: int) -> Usage:
    """Counts so far. Jobs come in groups of `samples` that share a prompt, counted once."""
    jobs = list(jobs)
    first = jobs[::samples]
    prompt = sum(len(job.prompt) for job in first)
    completion = sum(job.choice.tokens for job in jobs)
    cached = sum(job.choice.cached_tokens for job in first)
    usage = Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))
    counts = [job.choice.reasoning_tokens for job in jobs]
    if counts[0] is not None:
        reasoning = sum(count or 0 for count in counts)
        usage.completion_tokens_details = CompletionTokensDetails(reasoning)
    return usage
