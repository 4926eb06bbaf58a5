"""How often, and how soon, an engine that keeps dying is started again."""

from __future__ import annotations

from collections import deque
from collections.abc import Container

WINDOW_SECONDS = 600.0
_FIRST_DELAY = 0.25
_LONGEST_DELAY = 30.0


class RestartPolicy:
    """Exponential back-off, and an end to it: at most `limit` restarts in `WINDOW_SECONDS`.

    Restarts whose cause is gone are not limited, but back off as well.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._times: deque[tuple[float, bool]] = deque()  # and whether it counts

    def excuse(self, deaths: Container[float]) -> None:
        """Who caused these deaths is gone: it is as if they had not been."""
        self._times = deque(entry for entry in self._times if entry[0] not in deaths)

    def delay(self, now: float, *, counts: bool = True) -> float | None:
        """Seconds to wait before the restart after a death `now`; None: no more restarts."""
        while self._times and self._times[0][0] <= now - WINDOW_SECONDS:
            self._times.popleft()
        if counts and sum(counted for _, counted in self._times) >= self._limit:
            return None
        self._times.append((now, counts))
        recent = len(self._times) - 1
        return min(_FIRST_DELAY * 2 ** (recent - 1), _LONGEST_DELAY) if recent else 0.0
