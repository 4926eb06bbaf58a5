"""Stop strings: found across token borders, held back while they may still come, never leaked."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Cuts one stream of text at the leftmost occurrence of any stop string.

    How the text is split into pieces does not matter: what `feed` and `flush` return, joined, is
    the whole text up to the match. Among stops that begin at the same place the shortest counts.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """`stops` are not empty strings. With `include` the matched stop is part of the text."""
        self._stops = sorted(stops, key=len)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Add text; returns what is now certain to be output. After a match: ""."""
        if self.matched is not None:
            return ""
        held = self._held + text
        at, stop = self._find(held)
        partial = self._partial(held)
        if stop is not None and at <= partial:
            return self._cut(held, at, stop)
        self._held = held[partial:]
        return held[:partial]

    def flush(self) -> str:
        """The end of generation: what was held back, cut if a whole stop is in it."""
        if self.matched is not None:
            return ""
        held, self._held = self._held, ""
        at, stop = self._find(held)
        return held if stop is None else self._cut(held, at, stop)

    def _cut(self, held: str, at: int, stop: str) -> str:
        self.matched = stop
        self._held = ""
        return held[: at + len(stop)] if self._include else held[:at]

    def _find(self, text: str) -> tuple[int, str | None]:
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found, key=lambda hit: hit[0], default=(len(text), None))

    def _partial(self, text: str) -> int:
        """Where the earliest stop that the text may be in the middle of begins."""
        longest = len(self._stops[-1])
        for start in range(max(0, len(text) - longest + 1), len(text)):
            tail = text[start:]
            if any(len(tail) < len(stop) and stop.startswith(tail) for stop in self._stops):
                return start
        return len(text)
