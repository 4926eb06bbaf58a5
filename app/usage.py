"""Token counts of a response, as OpenAI names them."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from app.generation import Job


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_of(jobs: Iterable[Job], samples: int) -> Usage:
    """Counts so far. Jobs come in groups of `samples` that share a prompt, counted once."""
    jobs = list(jobs)
    first = jobs[::samples]
    prompt = sum(len(job.prompt) for job in first)
    completion = sum(job.choice.tokens for job in jobs)
    cached = sum(job.choice.cached_tokens for job in first)
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))
