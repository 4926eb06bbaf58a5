"""Adversaries instead of a model: they choose badly among what a grammar allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from app.inputs.tokenizer import Tokenizer
from batching.core.types import Grammar, SamplingParams
from batching.worker.grammar import WORD_BITS, Grammars, Matcher, allowed

Logits = Callable[[int], np.ndarray]  # by step, over the vocabulary
_PATIENCE = 60  # tokens before an adversary has to come to an end
_MOST_TOKENS = 4000


class Follower(Protocol):
    """What a library's matcher must do: `batching.worker.grammar.Matcher` does."""

    def fill(self, row: np.ndarray) -> bool: ...
    def accept(self, token: int) -> None: ...


class Driver:
    """Generates text under a grammar from made-up logits."""

    def __init__(
        self, tokenizer: Tokenizer, grammars: Grammars, vocab: int, ends: tuple[int, ...]
    ) -> None:
        self._grammars = grammars
        self._vocab = vocab
        self._ends = ends
        self.pieces = [tokenizer.token_bytes(i) for i in range(vocab)]
        # In turns, because what closes a string opens one elsewhere.
        preferences = ((b'"', 9.0), (b"}]", 9.0), (b"}]", 2.0), (b"", 0.0))
        self._closing = [
            np.array([_closes(piece, *some) for piece in self.pieces]) for some in preferences
        ]
        for scores in self._closing:
            scores[list(ends)] = 10.0

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher as the workers have it."""
        params = SamplingParams(_MOST_TOKENS, grammar=grammar, stop_token_ids=self._ends)
        return self._grammars.matcher(params)

    def generate(
        self, matcher: Follower, logits: Logits, patience: int | None = _PATIENCE
    ) -> str | None:
        """The text; None if it does not end. After `patience` closing pieces are preferred."""
        row = np.zeros(-(-self._vocab // WORD_BITS), dtype=np.int32)
        noise = np.random.default_rng(0)
        tokens: list[int] = []
        while len(tokens) < _MOST_TOKENS:
            if not matcher.fill(row):
                return None
            scores = logits(len(tokens))
            if patience is not None and len(tokens) >= patience:
                scores = noise.normal(0, 0.3, self._vocab) + self._closing[len(tokens) % 4]
            token = int(np.where(allowed(row, self._vocab), scores, -np.inf).argmax())
            matcher.accept(token)
            if token in self._ends:
                return b"".join(self.pieces[t] for t in tokens).decode()
            tokens.append(token)
        return None

    def adversaries(self, seed: int) -> dict[str, Logits]:
        """One that is random, one that repeats itself, one that opens and spaces, never closes."""
        rng = np.random.default_rng(seed)
        fixed = rng.standard_normal(self._vocab)
        opening = rng.standard_normal(self._vocab) - 9 * sum(self._closing)
        opening += [3 * sum(map(piece.count, (b"{", b"[", b" ", b"\n"))) for piece in self.pieces]
        return {
            "random": lambda step: rng.standard_normal(self._vocab),
            "stubborn": lambda step: fixed,
            "opening": lambda step: opening,
        }


def _closes(piece: bytes, best: bytes, much: float) -> float:
    if len(piece) != 1 or piece in b"{[":
        return -3.0
    return much if piece in best else 0.5 * (piece == b",")
