"""Where a JSON object ends that comes in pieces."""

from __future__ import annotations

_BETWEEN = frozenset(" \t\r\n,:+-.0123456789eEtrufalsn")  # what may stand outside strings
_OPENING = {"}": "{", "]": "["}


class JsonSpan:
    """Follows strings and brackets; `broken` once the text can be no JSON any more.

    Only that much is checked: a model's slip inside (a comma too many) is for the reader of the
    JSON to find.
    """

    def __init__(self, opened: str = "") -> None:
        """`opened`: brackets that were opened before the text begins."""
        self._open = list(opened)
        self._in_string = False
        self._escaped = False
        self.broken = False

    def find(self, text: str, depth: int) -> int | None:
        """Take more text up to where only `depth` brackets are open; None: not in this text.

        The position is that after the closing bracket. What follows it has not been taken.
        """
        for i, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._open.append(char)
            elif char in "}]":
                if not self._open or self._open.pop() != _OPENING[char]:
                    self.broken = True
                    return None
                if len(self._open) == depth:
                    return i + 1
            elif char not in _BETWEEN:
                self.broken = True
                return None
        return None
