"""Grammars as masks over one model's vocabulary, by llguidance. No torch here: `app` uses it too.

llguidance is imported with the first grammar. Its parser is lazy: what a grammar costs is spread
over the steps, a few microseconds each, and bounded by `LIMITS`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batching.core.types import Grammar, SamplingParams
from batching.worker.places import Place, Places, PlaceTokens
from batching.worker.short_numbers import NumberTokens, ShortNumbers
from batching.worker.unique_keys import KeyTokens, UniqueKeys

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

WORD_BITS = 32
_CACHED = 128  # compiled grammars kept, some 100 kB each
# What a grammar may cost at most, in llguidance's units.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,  # 20 ms
    "step_lexer_fuel": 200_000,  # 15 ms
    "step_max_items": 50_000,  # 3 ms
    "max_items_in_row": 20_000,  # optional keys of an object, times four
    "max_lexer_states": 50_000,  # 100 MB
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class Matcher:
    """Follows one sequence's text through its grammar."""

    def __init__(
        self,
        matcher: LLMatcher,
        end_tokens: tuple[int, ...],
        params: SamplingParams,
        keys: UniqueKeys | None,
        numbers: NumberTokens | None,
        places: Places | None,
    ) -> None:
        assert params.grammar is not None
        self.inner = matcher  # has taken in the first `_taken_in` tokens of `_said`
        self._said: list[int] = []
        self._taken_in = 0
        self._stops = tuple(dict.fromkeys((*end_tokens, *params.stop_token_ids)))
        self._stops_from = params.min_tokens
        self._to_the_end = end_tokens if params.grammar.to_the_end else ()
        self._keys = keys
        self._numbers = None if numbers is None else ShortNumbers(numbers, self._said)
        self._ends = end_tokens
        # What no token can be tried for on its own.
        self.has_rules = bool(keys or self._stops_from or self._to_the_end)
        self._places = None if self.has_rules else places
        self._place: Place | None = None if self._places is None else self._places.start

    def accept(self, token: int) -> None:
        """Take in a generated token. What the grammar does not allow ends it: `fill` is False."""
        self.catch_up()
        self._learn(token, self.inner.consume_token(token))
        if self._keys is not None:
            self._keys.accept(token)

    def try_accept(self, token: int) -> bool:
        """Take in a token if it is allowed, which is cheaper to ask than what is.

        Only for those without rules. In doubt it is refused: then the mask decides.
        """
        numbers, place = self._numbers, self._place
        if numbers is not None and numbers.digits[token]:
            is_text = place is not None and place.plain[token]
            if not is_text and numbers.doubts(token):
                return False
        if place is not None and (known := place.after(token)) is not None:
            self._place = known
            self._said.append(token)
            return True
        self.catch_up()
        if not (self.inner.try_consume_tokens([token]) or self._is_end(token)):
            return False
        self._learn(token, True)
        return True

    def catch_up(self) -> None:
        """Let llguidance take in what was known to be allowed: 0.6 µs a token."""
        if self._taken_in < len(self._said):
            self.inner.consume_tokens(self._said[self._taken_in :])
            self._taken_in = len(self._said)

    def _is_end(self, token: int) -> bool:
        """Whether the text is complete, so that it takes in nothing, and the token says so."""
        return token in self._ends and self.inner.is_stopped() and not self.inner.is_error()

    def _learn(self, token: int, allowed: bool) -> None:
        """Note what llguidance has taken in."""
        self._said.append(token)
        self._taken_in += 1
        if self._place is not None and self._places is not None:
            self._place = self._places.learn(self._place, token) if allowed else None

    def fill(self, row: np.ndarray) -> bool:
        """Write a bit per token id into `row` (int32 words): whether the token may come next.

        False if none may, or if the grammar is too complex to say.
        """
        return not fill_rows([self], row[np.newaxis])

    def restrict(self, row: np.ndarray) -> None:
        """Take from the grammar's mask what is not the grammar's to know."""
        if self._keys is not None:
            self._ban_repeated_keys(self._keys, row)
        early = self._stops if len(self._said) < self._stops_from else self._to_the_end
        if early and not self.inner.is_stopped():
            _clear(row, early)
        if self._numbers is not None:
            self._numbers.restrict(row)

    def _ban_repeated_keys(self, keys: UniqueKeys, row: np.ndarray) -> None:
        _clear(row, keys.repeating(row))
        for token in keys.doubtful():
            if _has(row, token):  # it must not lead to where only the banned quote may follow
                ahead, after, there = self.inner.deep_copy(), keys.copy(), np.empty_like(row)
                ahead.consume_token(token)
                after.accept(token)
                ahead.unsafe_compute_mask_ptr(there.ctypes.data, there.nbytes)
                _clear(there, after.repeating(there))
                if not there.any():
                    _clear(row, [token])


class Grammars:
    """Compiles grammars for one vocabulary, and keeps the recent ones by their content."""

    def __init__(self, folder: str, vocab_size: int, end_tokens: tuple[int, ...]) -> None:
        """`folder` has the model's tokenizer.json. It is read with the first grammar."""
        self._folder = folder
        self._vocab_size = vocab_size
        self._end_tokens = end_tokens
        self._tokenizer: LLTokenizer | None = None
        self._pieces: list[bytes] | None = None
        self._keys: KeyTokens | None = None
        self._numbers: NumberTokens | None = None
        self._place_tokens: PlaceTokens | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._places: dict[str, Places] = {}  # of compiled grammars

    @property
    def words(self) -> int:
        """Words of a mask's row. It may have more bits than the model has logits."""
        return -(-self.load().vocab_size // WORD_BITS)

    def matcher(self, params: SamplingParams) -> Matcher:
        """A matcher at the beginning of the text; of a faulty grammar one that allows nothing."""
        assert params.grammar is not None
        compiled = self._compile(params.grammar.source)
        grammar = params.grammar
        keys = UniqueKeys(self._key_tokens(), grammar.json_after) if grammar.free_keys else None
        numbers = self._number_tokens() if grammar.has_json else None
        places = self._places_of(grammar)
        return Matcher(compiled.deep_copy(), self._end_tokens, params, keys, numbers, places)

    def fault(self, grammar: Grammar) -> str | None:
        """Why the grammar cannot be used: its faults, or the limit that it exceeds."""
        compiled = self._compile(grammar.source)
        if compiled.is_error():
            return compiled.get_error()
        first = compiled.deep_copy()
        if not any(first.compute_bitmask()) or first.is_error():
            return "it allows no text at all"
        return None

    def _places_of(self, grammar: Grammar) -> Places | None:
        if grammar.free_values is None:
            return None
        if self._place_tokens is None:
            pieces, is_special = self._token_pieces(), self.load().is_special_token
            self._place_tokens = PlaceTokens(pieces, list(map(is_special, range(len(pieces)))))
        if grammar.source not in self._places:
            self._places[grammar.source] = Places(self._place_tokens, grammar.free_values)
        return self._places[grammar.source]

    def _key_tokens(self) -> KeyTokens:
        if self._keys is None:
            self._keys = KeyTokens(self._token_pieces())
        return self._keys

    def _number_tokens(self) -> NumberTokens:
        if self._numbers is None:
            self._numbers = NumberTokens(self._token_pieces(), self._end_tokens)
        return self._numbers

    def _token_pieces(self) -> list[bytes]:
        if self._pieces is None:
            tokenizer = self.load()
            self._pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        return self._pieces

    def _compile(self, source: str) -> LLMatcher:
        compiled = self._compiled.get(source)
        if compiled is not None:
            self._compiled.move_to_end(source)
            return compiled
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**_LIMITS)
        compiled = LLMatcher(self.load(), source, log_level=0, limits=limits)
        self._compiled[source] = compiled
        if len(self._compiled) > _CACHED:
            forgotten, _ = self._compiled.popitem(last=False)
            self._places.pop(forgotten, None)
        return compiled

    def load(self) -> LLTokenizer:
        """The vocabulary as llguidance sees it. The first call takes up to a second."""
        if self._tokenizer is not None:
            return self._tokenizer
        from llguidance import LLTokenizer

        text = (Path(self._folder) / "tokenizer.json").read_text(encoding="utf-8")
        ends = list(self._end_tokens)
        slices = LLTokenizer.json_slices()
        try:  # embeddings are often padded: ids beyond the tokenizer's are never allowed
            tokenizer = LLTokenizer(text, self._vocab_size, ends, slices)
        except ValueError:  # or the tokenizer has ids that the model lacks
            tokenizer = LLTokenizer(text, None, ends, slices)
        self._tokenizer = tokenizer
        return tokenizer


def fill_rows(matchers: Sequence[Matcher], rows: np.ndarray) -> list[int]:
    """Let each matcher `fill` its row of `rows` (int32 words). Returns the rows that failed."""
    address, size = rows.ctypes.data, rows.shape[1] * rows.itemsize
    failed = set()
    for i, matcher in enumerate(matchers):
        matcher.catch_up()
        matcher.inner.unsafe_compute_mask_ptr(address + i * size, size)
        if matcher.inner.is_error():
            failed.add(i)
        else:
            matcher.restrict(rows[i])
    failed.update(np.flatnonzero(~rows.any(axis=1)).tolist())
    return sorted(failed)


def allowed(rows: np.ndarray, vocab_size: int) -> np.ndarray:
    """The bits of masks int32 [n, words] as uint8 [n, vocab_size], 1 where the token may come."""
    return np.unpackbits(rows.view(np.uint8), axis=-1, count=vocab_size, bitorder="little")


def _has(row: np.ndarray, token: int) -> bool:
    return bool(row.view(np.uint32)[token // WORD_BITS] >> token % WORD_BITS & 1)


def _clear(row: np.ndarray, tokens: Sequence[int]) -> None:
    words = row.view(np.uint32)
    for token in tokens:
        words[token // WORD_BITS] &= ~np.uint32(1 << token % WORD_BITS)
