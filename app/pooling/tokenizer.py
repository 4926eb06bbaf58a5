"""A pooling model's tokenizer: plain ids of many texts, and the special tokens around them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer as Backend

from app.inputs.tokenizer import Tokenizer, TokenizerError


class Frame(NamedTuple):
    """The special tokens around a text, or around and between the two of a pair.

    `second_type` is where tokens of type 1 begin, counted from the second text's first token (so 0
    or a little less); None if there are none.
    """

    before: list[int]
    between: list[int]
    after: list[int]
    second_type: int | None = None

    @property
    def length(self) -> int:
        """Special tokens in all."""
        return len(self.before) + len(self.between) + len(self.after)


class PoolTokenizer:
    """Immutable after load; safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self.single = _frame(self._backend, pair=False)
        self.pair = _frame(self._backend, pair=True)

    @classmethod
    def load(cls, folder: Path) -> PoolTokenizer:
        """Read `tokenizer.json`. Raises `TokenizerError`."""
        return cls(Tokenizer.load(folder))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text without special tokens; leaves the interpreter to others meanwhile."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def _frame(backend: Backend, *, pair: bool) -> Frame:
    """What the tokenizer puts around texts, seen on a pair of short ones.

    Post-processors only add tokens, so texts can be cut as ids first and framed then.
    """
    framed = backend.encode("a", "b") if pair else backend.encode("a")
    sides = framed.sequence_ids
    starts = [i for i, side in enumerate(sides) if side is not None and side not in sides[:i]]
    ends = [i + sides.count(sides[i]) for i in starts]
    texts = [backend.encode(text, add_special_tokens=False).ids for text in "ab"[: 1 + pair]]
    if [framed.ids[i:j] for i, j in zip(starts, ends, strict=True)] != texts:
        raise TokenizerError("the tokenizer adds special tokens in a way that is not understood")
    before, after = framed.ids[: starts[0]], framed.ids[ends[-1] :]
    if not pair:
        return Frame(before, [], after)
    types = framed.type_ids
    second_type = types.index(1) - starts[1] if 1 in types else None
    return Frame(before, framed.ids[ends[0] : starts[1]], after, second_type)
