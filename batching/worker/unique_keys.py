"""No key twice in one JSON object, where a grammar leaves keys free.

A grammar cannot remember which keys were written. This reads the text along with it, and names the
tokens that would complete a key once more, for the mask to ban.
"""

from __future__ import annotations

import json

import numpy as np

_QUOTE, _ESCAPE, _COMMA = b'"\\,'
_OPEN_OBJECT, _CLOSE_OBJECT, _OPEN_ARRAY, _CLOSE_ARRAY = b"{}[]"


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
    """Follows JSON, and maybe words before it. Its well-formedness is the grammar's to ensure."""

    def __init__(self, tokens: KeyTokens) -> None:
        self._tokens = tokens
        self._objects: list[set[str] | None] = []  # keys of the open objects; None: an array
        self._text: bytearray | None = None  # of the string that is open
        self._begun = self._in_key = self._expects_key = self._escaped = False

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
        if not self._in_key or self._text is None or self._escaped:
            return []
        begun = _meaning(self._text)
        if begun is None:
            return []
        keys = self._objects[-1] or ()
        ends = (key[len(begun) :] for key in keys if key.startswith(begun))
        spelled = (json.dumps(end, ensure_ascii=False)[1:-1] for end in ends if end)
        return [
            token
            for end in spelled
            for token in self._tokens.by_piece.get(end.encode(errors="surrogateescape"), ())
        ]

    def copy(self) -> UniqueKeys:
        """The same place in the text."""
        other = UniqueKeys(self._tokens)
        other._objects = [keys if keys is None else set(keys) for keys in self._objects]
        other._text = None if self._text is None else bytearray(self._text)
        other._in_key, other._expects_key = self._in_key, self._expects_key
        other._escaped, other._begun = self._escaped, self._begun
        return other

    def _read(self, piece: bytes) -> bool:
        """Whether a key came that its object has already."""
        repeated = False
        for byte in piece:
            if self._text is not None:
                repeated = self._read_string(byte) or repeated
            elif byte == _QUOTE and (self._objects or not self._begun):  # else what is said before
                self._text, self._in_key = bytearray(), self._expects_key
            elif byte in (_OPEN_OBJECT, _OPEN_ARRAY):
                self._expects_key = byte == _OPEN_OBJECT
                self._objects.append(set() if self._expects_key else None)
            elif byte in (_CLOSE_OBJECT, _CLOSE_ARRAY):
                self._expects_key = False
                if self._objects:
                    self._objects.pop()
            elif byte == _COMMA:
                self._expects_key = bool(self._objects) and self._objects[-1] is not None
            self._begun = True
        return repeated

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
        key = _meaning(text)
        if key is None:
            return False
        repeated = key in keys
        keys.add(key)
        return repeated


def _meaning(text: bytes | bytearray) -> str | None:
    """The string that the text between two quotes stands for: escapes spell one key in many ways.

    None if it stands for none, as amid an escape.
    """
    try:
        return str(json.loads(f'"{text.decode(errors="surrogateescape")}"', strict=False))
    except ValueError:
        return None
