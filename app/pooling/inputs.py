"""Texts to token ids for pooling models: all at once, cut where asked, refused where too long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from app.http.errors import ApiError
from app.inputs.prompts import check_token_ids, split_prompts
from app.inputs.tokenizer import CHARS_PER_TOKEN, CUT_SLACK
from app.pooling.tokenizer import Frame, PoolTokenizer
from app.schemas.pooling import PoolFields
from batching.worker.pool_protocol import PoolCapabilities

MAX_INPUTS = 2048  # of one call, as OpenAI has it


class Texts(NamedTuple):
    """Texts that are not empty, and what to call each in an error."""

    values: list[str]
    names: list[str]


class Encoded(NamedTuple):
    """Token ids of a text or pair, and where the second text begins for models that ask."""

    ids: list[int]
    second: int | None = None


@dataclass(frozen=True)
class Encoder:
    """How the texts of one call become tokens. Safe to use off the event loop.

    Every method raises `ApiError` that names the offending text.
    """

    tokenizer: PoolTokenizer
    capabilities: PoolCapabilities
    keep: int | None  # of more tokens only so many are used, special ones included
    side: str  # where the others are cut off

    @classmethod
    def of(
        cls, tokenizer: PoolTokenizer, capabilities: PoolCapabilities, fields: PoolFields
    ) -> Encoder:
        """The encoder that a request asks for."""
        keep, limit = fields.truncate_prompt_tokens, capabilities.max_model_len
        if keep == 0 or (keep is not None and keep > limit):
            message = f"must be -1, or 1 to {limit}, the most tokens this model takes"
            raise bad("truncate_prompt_tokens", message)
        return cls(tokenizer, capabilities, limit if keep == -1 else keep, fields.truncation_side)

    def inputs(self, value: str | list[Any], add_special_tokens: bool) -> list[Encoded]:
        """One entry a text or list of ids of `input`; ids are used exactly as given."""
        prompts = split_prompts(value, "input")
        check_count(len(prompts), "input")
        if isinstance(prompts[0], str):
            frame = self.tokenizer.single if add_special_tokens else Frame([], [], [])
            return self.texts(text_list(value, "input"), frame=frame)
        names = ["input"] if len(prompts) == 1 else [f"input[{i}]" for i in range(len(prompts))]
        encoded = []
        for ids, name in zip(prompts, names, strict=True):
            assert isinstance(ids, list)  # `split_prompts` allows no mixture
            ids = self._cut(ids, self.keep)
            self._check_length(len(ids), name)
            check_token_ids(ids, self.capabilities.vocab_size, name)
            encoded.append(Encoded(ids))
        return encoded

    def texts(self, texts: Texts, most: int = 0, frame: Frame | None = None) -> list[Encoded]:
        """One entry a text. `most` bounds its own tokens; 0: nothing does."""
        before, _, after, _ = frame = self.tokenizer.single if frame is None else frame
        room = self._room(frame)
        encoded = []
        for ids, name in zip(self._ids(texts, most), texts.names, strict=True):
            ids = [*before, *self._cut(ids, room), *after]
            self._check_length(len(ids), name)
            encoded.append(Encoded(ids))
        return encoded

    def pairs(self, first: Texts, second: Texts, most: tuple[int, int]) -> list[Encoded]:
        """One entry for each of `second`, behind its partner or behind the only one there is.

        `most` bounds the own tokens of each side; 0: nothing does.
        """
        frame = self.tokenizer.pair
        room = self._room(frame)
        seconds = self._ids(second, most[1])
        firsts = self._ids(first, most[0])
        if len(firsts) == 1:
            firsts *= len(seconds)
        encoded = []
        for a, b, name in zip(firsts, seconds, second.names, strict=True):
            if room is not None:
                a, b = self._share(a, b, room)
            ids = [*frame.before, *a, *frame.between, *b, *frame.after]
            self._check_length(len(ids), name)
            start = len(frame.before) + len(a) + len(frame.between)
            split = None if frame.second_type is None else start + frame.second_type
            encoded.append(Encoded(ids, split))
        return encoded

    def _ids(self, texts: Texts, most: int) -> list[list[int]]:
        """Ids without special tokens. The tail of a long text is read only if it matters."""
        limit = self.capabilities.max_model_len
        head = max(limit, most) * CHARS_PER_TOKEN
        # Of a text cut on its left the tail is what counts.
        whole = self.keep is not None and self.side == "left" and not most
        values = texts.values
        if self.capabilities.lower_case:
            values = [value.lower() for value in values]
        rows = self.tokenizer.encode(values if whole else [value[:head] for value in values])
        for i, value in enumerate(values):
            if len(value) > head and not whole:
                if len(rows[i]) <= max(limit, most) + CUT_SLACK:
                    (rows[i],) = self.tokenizer.encode([value])
                elif self.keep is None and not most:
                    raise self._too_long(texts.names[i])
        return [row[:most] for row in rows] if most else rows

    def _room(self, frame: Frame) -> int | None:
        """Tokens that texts may have beside special ones; None: as many as they have."""
        if self.keep is None:
            return None
        if self.keep <= frame.length:
            message = f"must be more than the {frame.length} special tokens that the model adds"
            raise bad("truncate_prompt_tokens", message)
        return self.keep - frame.length

    def _share(self, a: list[int], b: list[int], room: int) -> tuple[list[int], list[int]]:
        """Cut the longer text first, then both alike."""
        if len(a) + len(b) <= room:
            return a, b
        short = min(len(a), len(b), room // 2)
        longer_first = len(a) > len(b)
        sizes = (room - short, short) if longer_first else (short, room - short)
        return self._cut(a, sizes[0]), self._cut(b, sizes[1])

    def _cut(self, ids: list[int], length: int | None) -> list[int]:
        if length is None or len(ids) <= length:
            return ids
        return ids[len(ids) - length :] if self.side == "left" else ids[:length]

    def _check_length(self, length: int, name: str) -> None:
        if length > self.capabilities.max_model_len:
            raise self._too_long(name, length)
        if not length:
            raise bad(name, "the text has no tokens")

    def _too_long(self, name: str, length: int | None = None) -> ApiError:
        has = "is too long" if length is None else f"has {length} tokens"
        return ApiError(
            f"{name}: the text {has}; this model takes at most {self.capabilities.max_model_len} "
            "(set truncate_prompt_tokens to -1 to use what fits)",
            param=name,
            code="context_length_exceeded",
        )


def text_list(value: str | list[Any], name: str) -> Texts:
    """A text or texts. Raises `ApiError`."""
    values = [value] if isinstance(value, str) else value
    check_count(len(values), name)
    names = [name] if isinstance(value, str) else [f"{name}[{i}]" for i in range(len(values))]
    for item, called in zip(values, names, strict=True):
        if not isinstance(item, str):
            raise bad(called, "expected a text")
        if not item:
            raise bad(called, "the text is empty")
    return Texts(values, names)


def check_count(count: int, name: str) -> None:
    """Raises `ApiError` for a list that is empty or too long."""
    if not count:
        raise bad(name, "the list is empty")
    if count > MAX_INPUTS:
        raise bad(name, f"at most {MAX_INPUTS} texts are allowed in one request, got {count}")


def bad(name: str, message: str) -> ApiError:
    """The field `name` has a wrong value."""
    return ApiError(f"{name}: {message}", param=name, code="invalid_value")
