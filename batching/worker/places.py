"""Where a JSON text has come to in its schema, so that each question is asked once.

What llguidance says costs microseconds, most of them for memory that the model's weights have
driven out of the cache. But texts that differ only in values that may be anything are at one place,
where the same may follow: each place remembers which tokens were allowed and where they lead.
"""

from __future__ import annotations

import json
import re

_MOST = 1024  # places of one grammar; a schema with few free values has more, which are not kept
_LONGEST = 2000  # bytes of a place's text
_CHARACTER = rb'[^"\\\x00-\x1f\x7f-\xff]|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}' \
    rb"|[\xf0-\xf4][\x80-\xbf]{3}"  # fmt: skip
_PLAIN = re.compile(rb"(?:%s)+" % _CHARACTER)


class PlaceTokens:
    """The vocabulary's tokens; `plain` is 1 for those that may follow within any free string."""

    def __init__(self, pieces: list[bytes], special: list[bool]) -> None:
        self.pieces = pieces
        self.plain = bytes(
            not is_special and _PLAIN.fullmatch(piece) is not None
            for piece, is_special in zip(pieces, special, strict=True)
        )
        self.none = bytes(len(pieces))


class Place:
    """Texts after which the same may follow; `text` is the one whose free values are shortest."""

    __slots__ = ("following", "plain", "text")

    def __init__(self, text: bytes, plain: bytes) -> None:
        self.text = text
        self.plain = plain  # 1 for tokens that change nothing
        self.following: dict[int, Place] = {}  # by tokens that were allowed

    def after(self, token: int) -> Place | None:
        """Where a token leads that is known to be allowed."""
        return self if self.plain[token] else self.following.get(token)


class Places:
    """Those of one schema, as far as texts have come to them."""

    def __init__(self, tokens: PlaceTokens, names: tuple[str, ...]) -> None:
        """`names` as in `Grammar.free_values`."""
        self._tokens = tokens
        keys = b"|".join(re.escape(json.dumps(name, ensure_ascii=False)).encode() for name in names)
        value = rb"(?<!\\)((?:%s): ?" % (keys or b"(?!)")
        string = value + rb'(?:\[(?:"", ?)*)?")'  # one that begins, perhaps in an array
        self._strings = re.compile(string + rb'(?:%s|\\["\\/bfnrt])+' % _CHARACTER)
        self._within = re.compile(string + rb"\Z")
        self._digits = re.compile(value + rb"-?)[1-9][0-9]*")
        self._decimals = re.compile(value + rb"-?[01]\.)[0-9]+")
        self._places: dict[bytes, Place] = {}
        self.start = self._at(b"")

    def learn(self, place: Place, token: int) -> Place | None:
        """Where a token leads that was found to be allowed; None: such a place is not kept."""
        found = place.after(token)
        if found is None and len(self._places) < _MOST and len(place.text) < _LONGEST:
            found = place.following[token] = self._at(place.text + self._tokens.pieces[token])
        return found

    def _at(self, text: bytes) -> Place:
        text = self._strings.sub(rb"\1", text)
        text = self._decimals.sub(rb"\g<1>1", self._digits.sub(rb"\g<1>1", text))
        if text not in self._places:
            is_within = self._within.search(text) is not None
            self._places[text] = Place(text, self._tokens.plain if is_within else self._tokens.none)
        return self._places[text]
