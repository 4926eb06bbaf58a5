"""No key twice in one JSON object, where a grammar leaves keys free.

A grammar cannot remember which keys were written. This reads the text along with it, and names the
tokens that would complete a key once more, for the mask to ban.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from copy import copy

import numpy as np

_QUOTE, _ESCAPE, _COMMA = b'"\\,'
_OPEN_OBJECT, _CLOSE_OBJECT, _OPEN_ARRAY, _CLOSE_ARRAY = b"{}[]"
# Of a string: all but an escape that is not complete, and that.
_ESCAPES = re.compile(r"((?:[^\\]|\\u[0-9a-fA-F]{4}|\\[^u])*)(.*)", re.DOTALL)
_BEGINNINGS = b'"{['  # of values that have strings
_BETWEEN = b" \n\r\t,;"  # values that follow each other


class KeyTokens:
    """The vocabulary's tokens with quotes: only they can complete a key."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.by_piece: dict[bytes, list[int]] = {}
        for i, piece in enumerate(pieces):
            self.by_piece.setdefault(piece, []).append(i)
        counts = [piece.count(_QUOTE) for piece in pieces]
        self.closing = np.array([i for i, count in enumerate(counts) if count], dtype=np.int64)
        # Out of a key it takes two: one to open it.
        self.whole = np.array([i for i, count in enumerate(counts) if count > 1], dtype=np.int64)


class UniqueKeys:
    """Follows JSON, and other text around it. Its well-formedness is the grammar's to ensure.

    A value begins after one of the texts `after` ("": the beginning) or another value.
    """

    def __init__(self, tokens: KeyTokens, after: Sequence[str]) -> None:
        self._tokens = tokens
        self._markers = tuple(marker.encode() for marker in after if marker)
        self._longest = max(map(len, self._markers), default=0)
        self._tail = b""  # of the text outside of values
        self._awaits = "" in after  # outside of values, and one may begin
        self._objects: list[set[str] | None] = []  # keys of the open objects; None: an array
        self._text: bytearray | None = None  # of the string that is open
        self._in_key = self._expects_key = self._escaped = False

    def accept(self, token: int) -> None:
        """Read a generated token."""
        self._read(self._tokens.pieces[token])

    def repeating(self, row: np.ndarray) -> list[int]:
        """Tokens of `row` (a bit each, int32 words) that would complete a key once more."""
        if not any(self._objects):
            return []
        tokens = self._tokens.closing if self._in_key else self._tokens.whole
        bits = np.uint32(1) << (tokens % 32).astype(np.uint32)
        may_come = tokens[(row.view(np.uint32)[tokens // 32] & bits) != 0].tolist()
        pieces = self._tokens.pieces
        return [token for token in may_come if self.copy()._read(pieces[token])]

    def doubtful(self) -> list[int]:
        """Tokens after which a key that came already is complete but for its quote."""
        if not self._in_key or self._text is None:
            return []
        found = _ESCAPES.fullmatch(self._text.decode(errors="surrogateescape"))
        assert found is not None
        whole, begun_escape = found.groups()
        begun = _meaning(whole)
        if begun is None:
            return []
        keys = self._objects[-1] or ()
        ends = [key[len(begun) :] for key in keys if key.startswith(begun)]
        spelled = {text for end in ends if end for text in _spellings(end, begun_escape)}
        return [
            token
            for text in sorted(spelled)
            for token in self._tokens.by_piece.get(text.encode(errors="surrogateescape"), ())
        ]

    def copy(self) -> UniqueKeys:
        """The same place in the text."""
        other = copy(self)
        other._objects = [keys if keys is None else set(keys) for keys in self._objects]
        other._text = None if self._text is None else bytearray(self._text)
        return other

    def _read(self, piece: bytes) -> bool:
        """Whether a key came that its object has already."""
        repeated = False
        for byte in piece:
            if self._text is not None:
                repeated = self._read_string(byte) or repeated
            elif self._objects or (self._awaits and byte in _BEGINNINGS):
                self._read_structure(byte)
            else:
                self._read_around(byte)
        return repeated

    def _read_structure(self, byte: int) -> None:
        if byte == _QUOTE:
            self._text, self._in_key = bytearray(), self._expects_key
        elif byte in (_OPEN_OBJECT, _OPEN_ARRAY):
            self._expects_key = byte == _OPEN_OBJECT
            self._objects.append(set() if self._expects_key else None)
        elif byte in (_CLOSE_OBJECT, _CLOSE_ARRAY):
            self._expects_key = False
            self._objects.pop()
        elif byte == _COMMA:
            self._expects_key = self._objects[-1] is not None

    def _read_around(self, byte: int) -> None:
        if self._markers:
            self._tail = (self._tail + bytes((byte,)))[-self._longest :]
        at_marker = self._tail.endswith(self._markers)
        self._awaits = at_marker or (self._awaits and byte in _BETWEEN)

    def _read_string(self, byte: int) -> bool:
        assert self._text is not None
        if byte != _QUOTE or self._escaped:
            self._escaped = byte == _ESCAPE and not self._escaped
            self._text.append(byte)
            return False
        text, keys = self._text, self._objects[-1] if self._in_key else None
        self._text, self._in_key, self._expects_key = None, False, False
        if keys is None:
            return False
        key = _meaning(text.decode(errors="surrogateescape"))
        if key is None:
            return False
        repeated = key in keys
        keys.add(key)
        return repeated


def _spellings(end: str, begun_escape: str) -> Iterator[str]:
    """What completes a string that lacks `end`, in its plain spelling but for what is begun."""
    rest = json.dumps(end[1:], ensure_ascii=False)[1:-1]
    plain, escaped = json.dumps(end[0], ensure_ascii=False)[1:-1], f"\\u{ord(end[0]):04x}"
    slash = "\\/" if end[0] == "/" else plain
    for first in (plain, slash, escaped, escaped[:2] + escaped[2:].upper()):
        if first.startswith(begun_escape) and (begun_escape or first == plain):
            yield first[len(begun_escape) :] + rest


def _meaning(text: str) -> str | None:
    """The string that the text between two quotes stands for: escapes spell one key in many ways.

    None if it stands for none.
    """
    try:
        return str(json.loads(f'"{text}"', strict=False))
    except ValueError:
        return None
