"""A bounded queue: who is let in, and what the others are told."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from app.errors import ApiError
from batching.core.types import EngineStats

_MAX_RETRY_SECONDS = 60


class Admission:
    """Counts requests and prompt tokens that wait for their first token."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.requests = 0
        self.tokens = 0
        self.rejections: Counter[str] = Counter()  # by limit, in vLLM's words

    def admit(self, lengths: Sequence[int], stats: EngineStats) -> None:
        """Take in sequences of these prompt lengths, all or none.

        A single call on an empty queue is always let in as far as tokens go, since a prompt that
        fits the model must be servable. Raises `ApiError`: 400 if they can never be let in
        together, else 429 with `Retry-After`.
        """
        self.check_count(len(lengths))
        total = sum(lengths)
        if self.requests + len(lengths) > self.max_requests:
            raise self._full("max_num_queued_reqs", f"{self.max_requests} requests", stats)
        if self.requests and self.tokens + total > self.max_tokens:
            raise self._full("max_num_queued_tokens", f"{self.max_tokens} prompt tokens", stats)
        self.requests += len(lengths)
        self.tokens += total

    def check_count(self, sequences: int) -> None:
        """Raises `ApiError` (400) if no queue could hold so many sequences of one request."""
        if sequences > self.max_requests:
            raise ApiError(
                f"prompts times n makes {sequences} sequences; at most {self.max_requests} "
                "are allowed in one request",
                param="n",
                code="invalid_value",
            )

    def release(self, length: int) -> None:
        """A sequence got its first token, or will never."""
        self.requests -= 1
        self.tokens -= length

    def retry_after(self, stats: EngineStats) -> int:
        """Whole seconds until the queue may have moved, from the engine's mean prompt rate."""
        rate = stats.prompt_tokens / stats.forward_seconds if stats.forward_seconds else 0.0
        seconds = self.tokens / rate if rate else 1.0
        return min(max(math.ceil(seconds), 1), _MAX_RETRY_SECONDS)

    def _full(self, reason: str, limit: str, stats: EngineStats) -> ApiError:
        self.rejections[reason] += 1
        return ApiError(
            f"the queue is full: it holds at most {limit} ({reason})",
            status=429,
            code=reason,
            headers={"retry-after": str(self.retry_after(stats))},
        )
