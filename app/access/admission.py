"""A bounded queue: who is let in, and what the others are told."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from app.http.errors import ApiError
from batching.core.types import EngineStats

_MAX_RETRY_SECONDS = 60

Forecast = Callable[[], float | None]


class Admission:
    """Counts requests and prompt tokens that wait for their first token.

    `forecast` says in how many seconds all that waits will have been taken up, if that is known.
    """

    def __init__(
        self, max_requests: int, max_tokens: int, forecast: Forecast = lambda: None
    ) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.requests = 0
        self.tokens = 0
        self.rejections: Counter[str] = Counter()  # by limit, in vLLM's words
        self._forecast = forecast

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
        """Whole seconds until what waits now is taken up: by forecast, else at the mean rate."""
        seconds = self._forecast()
        if seconds is None:
            rate = stats.prompt_tokens / stats.forward_seconds if stats.forward_seconds else 0.0
            seconds = self.tokens / rate if rate else 1.0
        return whole_seconds(seconds)

    def _full(self, reason: str, limit: str, stats: EngineStats) -> ApiError:
        self.rejections[reason] += 1
        return ApiError(
            f"the queue is full: it holds at most {limit} ({reason}); {self.requests} requests "
            f"with {self.tokens} prompt tokens wait now",
            status=429,
            code=reason,
            headers={"retry-after": str(self.retry_after(stats))},
        )


def whole_seconds(seconds: float) -> int:
    """For a `Retry-After` header."""
    return min(max(math.ceil(seconds), 1), _MAX_RETRY_SECONDS)
