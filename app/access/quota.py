"""How much the holder of a key may use: buckets that refill evenly, and requests open at once."""

from __future__ import annotations

import time
from collections.abc import Callable

from app.access.admission import whole_seconds
from app.http.errors import ApiError

EXCEEDED = "rate_limit_exceeded"  # of errors and metrics

Clock = Callable[[], float]


class Bucket:
    """`per_minute` of something: that many at once, refilled evenly. None: without end.

    What is found out later (tokens generated) is taken without asking, so it may go into debt.
    """

    def __init__(self, per_minute: int | None, clock: Clock) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute or 0)
        self._updated = clock()

    def resize(self, per_minute: int | None) -> None:
        """Another limit from now on; what was used stays used."""
        used = (self.per_minute or 0) - self.level()
        self.per_minute = per_minute
        self._level = (per_minute or 0) - used

    def level(self) -> float:
        """What may be taken now."""
        now, size = self._clock(), self.per_minute or 0
        self._level = min(self._level + (now - self._updated) * size / 60, size)
        self._updated = now
        return self._level

    def take(self, amount: int) -> None:
        """Count what was used."""
        if self.per_minute is not None:
            self._level = self.level() - amount

    def seconds_until(self, amount: float) -> float:
        """Until so many may be taken; 0 if they may now. More than fits is as much as fits."""
        if self.per_minute is None:
            return 0.0
        missing = min(amount, self.per_minute) - self.level()
        return max(missing * 60 / self.per_minute, 0.0)

    def headers(self, what: str) -> dict[str, str]:
        """As OpenAI names them."""
        if self.per_minute is None:
            return {}
        return {
            f"x-ratelimit-limit-{what}": str(self.per_minute),
            f"x-ratelimit-remaining-{what}": str(max(int(self.level()), 0)),
            f"x-ratelimit-reset-{what}": f"{self.seconds_until(self.per_minute):.3f}s",
        }


class Quota:
    """What one key has used of its limits."""

    def __init__(self, name: str, clock: Clock = time.monotonic) -> None:
        self.requests = Bucket(None, clock)
        self.tokens = Bucket(None, clock)
        self.concurrent: int | None = None
        self.open = 0  # requests under way
        self._name = name

    def limit(self, requests: int | None, tokens: int | None, concurrent: int | None) -> None:
        """Set the limits; what was used stays used."""
        self.requests.resize(requests)
        self.tokens.resize(tokens)
        self.concurrent = concurrent

    def enter(self) -> None:
        """A request begins; `leave` must follow. Raises `ApiError` (429), and counts nothing."""
        if self.concurrent is not None and self.open >= self.concurrent:
            raise self._exceeded(f"{self.concurrent} requests at once", 1.0)
        if wait := self.requests.seconds_until(1):
            raise self._exceeded(f"{self.requests.per_minute} requests a minute", wait)
        # Debts of earlier answers: known before the body is read.
        if wait := self.tokens.seconds_until(1):
            raise self._exceeded(f"{self.tokens.per_minute} tokens a minute", wait)
        self.requests.take(1)
        self.open += 1

    def leave(self) -> None:
        """It is answered."""
        self.open -= 1

    def take_prompt(self, tokens: int) -> None:
        """Its prompt's tokens are known. Raises `ApiError` (429), and takes nothing.

        One prompt larger than the whole limit is let in when nothing else was used.
        """
        if wait := self.tokens.seconds_until(tokens):
            raise self._exceeded(f"{self.tokens.per_minute} tokens a minute", wait)
        self.tokens.take(tokens)

    def headers(self) -> dict[str, str]:
        """What is left, for the answer."""
        return self.requests.headers("requests") | self.tokens.headers("tokens")

    def _exceeded(self, limit: str, wait: float) -> ApiError:
        return ApiError(
            f"the key {self._name!r} may have {limit}; try again in {wait:.1f} s",
            status=429,
            code=EXCEEDED,
            headers={"retry-after": str(whole_seconds(wait))},
        )
