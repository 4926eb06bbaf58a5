"""How often, and how soon, an engine that keeps dying is started again."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 600.0
_FIRST_DELAY = 0.25
_LONGEST_DELAY = 30.0


class RestartPolicy:
    """Exponential back-off, and an end to it: at most `limit` restarts in `WINDOW_SECONDS`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._times: deque[float] = deque()

    def delay(self, now: float) -> float | None:
        """Seconds to wait before the restart that is due `now`; None: no more restarts."""
        while self._times and self._times[0] <= now - WINDOW_SECONDS:
            self._times.popleft()
        if len(self._times) >= self._limit:
            return None
        self._times.append(now)
        recent = len(self._times) - 1
        return min(_FIRST_DELAY * 2 ** (recent - 1), _LONGEST_DELAY) if recent else 0.0
