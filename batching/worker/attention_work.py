"""How a step's attention is cut into pieces of work for the Triton kernels: numbers, no device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FIELDS = 8  # int32 of a row; `attention_kernels.py` says what they are


@dataclass(frozen=True)
class Division:
    """Rows int32 [n, FIELDS] of joins, prompt tiles and single queries, the longest ones first.

    `partials` is how many partial results the joins add up.
    """

    joins: np.ndarray
    tiles: np.ndarray
    singles: np.ndarray
    partials: int

    def table(self, reserved: int) -> np.ndarray:
        """What the kernels read, with room for `reserved` joins."""
        header = _rows(len(self.tiles), len(self.singles), len(self.joins))
        unused = np.zeros((reserved - len(self.joins), FIELDS), np.int32)
        return np.concatenate([header, self.joins, unused, self.tiles, self.singles])


def divide(
    counts: list[int], contexts: list[int], queries: int, keys: int, split: int, window: int | None
) -> Division:
    """Cut a step whose sequences add `counts` tokens and then have `contexts`.

    A prompt tile has up to `queries` queries and all their keys. The keys of a sequence that adds
    one token are cut at multiples of `split`. First keys are multiples of `keys`.
    """
    count, context = np.array(counts), np.array(contexts)
    token = np.cumsum(count) - count
    many, single = np.flatnonzero(count > 1), np.flatnonzero(count == 1)

    sequence, step = _spread(many, -(-count[many] // queries))
    offset = step * queries
    position = (context - count)[sequence] + offset
    taken = np.minimum(queries, count[sequence] - offset)
    first = _first_key(position, keys, window)
    tiles = _rows(sequence, token[sequence] + offset, taken, position, first, position + taken, -1)

    last = context[single] - 1
    begin = _first_key(last, keys, window)
    splits = last // split - begin // split + 1
    partials = np.where(splits > 1, splits, 0)
    first_partial = np.cumsum(partials) - partials
    which, step = _spread(np.arange(len(single)), splits)
    cut = (begin[which] // split + step) * split
    singles = _rows(
        single[which],
        token[single[which]],
        1,
        last[which],
        np.maximum(cut, begin[which]),
        np.minimum(cut + split, last[which] + 1),
        np.where(partials[which] > 0, first_partial[which] + step, -1),
    )
    joined = np.flatnonzero(partials)
    joins = _rows(token[single[joined]], first_partial[joined], partials[joined])
    return Division(joins, _longest_first(tiles), _longest_first(singles), int(partials.sum()))


def most_splits(max_context: int, split: int) -> int:
    """The most pieces that one sequence's keys are cut into."""
    return -(-max_context // split)


def _spread(values: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each value so many times, and how many times it came before."""
    step = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
    return np.repeat(values, times), step


def _first_key(position: np.ndarray, keys: int, window: int | None) -> np.ndarray:
    if window is None:
        return np.zeros_like(position)
    return np.maximum(position + 1 - window, 0) // keys * keys


def _rows(*columns: np.ndarray | int) -> np.ndarray:
    rows = np.zeros((np.size(columns[0]), FIELDS), np.int32)
    for column, values in enumerate(columns):
        rows[:, column] = values
    return rows


def _longest_first(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(rows[:, 4] - rows[:, 5], kind="stable")]
