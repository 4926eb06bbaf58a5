"""No JSON number without end: a schema bounds no digits, and a small model may write them for ever.

What is left fits every reader: integers int64, others float64, whose digits it keeps.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

MOST_DIGITS = 18  # before the point
MOST_DECIMALS = 17
MOST_EXPONENT = 2
_TAIL = 48  # bytes, and tokens: more than a number has
_FEW = 4  # tokens: most numbers are short
_OF_NUMBERS = b"0123456789.eE+-"
# The text's end, where it is a number so far. Digits that follow a quote are a string's.
_NUMBER = re.compile(rb"[\s:,\[]-?([0-9]*)(\.[0-9]*)?(?:[eE][+-]?([0-9]*))?\Z")
_IN_NUMBERS = frozenset(b"0123456789.eE,]} \n\r\t")  # what may follow a digit of a number


class NumberTokens:
    """The vocabulary's tokens by the digits that they begin with."""

    def __init__(self, pieces: list[bytes], end_tokens: tuple[int, ...]) -> None:
        self.pieces = pieces
        self.digits = bytes(min(len(p) - len(p.lstrip(b"0123456789")), 255) for p in pieces)
        self.longest = max(self.digits)
        elsewhere = [i for i, p in enumerate(pieces) if p and p[0] not in _IN_NUMBERS]
        self._elsewhere = self._bits([i for i in elsewhere if i not in end_tokens])
        self._zeros = self._bits([i for i, p in enumerate(pieces) if p.isdigit() and p[-1] == 48])

    def ban_longer(self, row: np.ndarray, room: int) -> None:
        """Take from `row` (a bit each, int32 words) what begins with more than `room` digits.

        But nothing in a string, which may have anything; and if only digits are left, which one is
        to end, those that do not end in 0: a lower bound that is excluded wants another one.
        """
        words = row.view(np.uint32)
        if (words & self._elsewhere[: len(words)]).any():
            return
        for banned in (self._longer(room), self._zeros):
            rest = words & ~banned[: len(words)]
            if rest.any():
                words[:] = rest
                return

    @lru_cache(maxsize=64)  # noqa: B019 (one vocabulary lives as long as the process)
    def _longer(self, room: int) -> np.ndarray:
        return self._bits([i for i, count in enumerate(self.digits) if count > max(room, 0)])

    def _bits(self, tokens: list[int]) -> np.ndarray:
        bits = np.zeros(-(-len(self.pieces) // 32) * 32, dtype=bool)
        bits[tokens] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)


class ShortNumbers:
    """Follows a text that has JSON in it, and knows how many digits may come next."""

    def __init__(self, tokens: NumberTokens, said: list[int]) -> None:
        """`said` are the text's tokens so far, always."""
        self._tokens, self._pieces = tokens, tokens.pieces
        self._said = said
        self.digits = tokens.digits

    def doubts(self, token: int) -> bool:
        """Whether a token that begins with digits makes a number too long, if it is one."""
        recent = b"".join([self._pieces[said] for said in self._said[-_FEW:]])
        before = recent.rstrip(_OF_NUMBERS)
        if before or len(self._said) <= _FEW:  # the number begins here
            length = len(recent) - len(before) + self.digits[token]
            if length <= 2 + MOST_EXPONENT:  # such as 1e99
                return False
        return self.digits[token] > self._room()

    def restrict(self, row: np.ndarray) -> None:
        """Ban the tokens (a bit each, int32 words) that make a number too long."""
        if (room := self._room()) < self._tokens.longest:
            self._tokens.ban_longer(row, room)

    def _room(self) -> int:
        """Digits that may follow; 255: any number of them."""
        tail = b"".join([self._pieces[token] for token in self._said[-_TAIL:]])
        # A number may be all there is.
        found = _NUMBER.search(tail[-_TAIL:] if len(self._said) > _TAIL else b"," + tail)
        if found is None:
            return 255
        whole, decimals, exponent = found.groups()
        if exponent is not None:
            return MOST_EXPONENT - len(exponent)
        if decimals is not None:
            return MOST_DECIMALS + 1 - len(decimals)
        return MOST_DIGITS - len(whole)
