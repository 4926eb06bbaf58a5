"""Parts grouped into runs, for APIs whose answers are lists of items: one is open at a time."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from app.turns.parts import CallArguments, CallBegin, Part


class Step(Enum):
    CLOSE = "close"
    OPEN = "open"
    MORE = "more"


class Runs:
    """Text, reasoning and each call are runs; what follows of the same kind belongs to them."""

    def __init__(self) -> None:
        self._last: Part | None = None

    def feed(self, part: Part) -> Iterator[tuple[Step, Part]]:
        """CLOSE comes with the run's last part, OPEN and MORE with `part`. OPEN's is news, too."""
        if self._last is not None and self._continues(self._last, part):
            yield Step.MORE, part
        else:
            yield from self.end()
            yield Step.OPEN, part
        self._last = part

    def end(self) -> Iterator[tuple[Step, Part]]:
        """Close what is open."""
        if self._last is not None:
            yield Step.CLOSE, self._last
        self._last = None

    @staticmethod
    def _continues(last: Part, part: Part) -> bool:
        if isinstance(part, CallBegin):
            return False
        return isinstance(part, CallArguments) or type(part) is type(last)
