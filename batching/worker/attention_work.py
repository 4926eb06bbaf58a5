"""How a step's attention is cut into pieces of work for the Triton kernels: numbers, no device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FIELDS = 8  # int32 of a row; `attention_kernels.py` says what they are


@dataclass(frozen=True)
class Division:
    """Rows int32 [n, FIELDS] of prompt tiles and single queries, the longest ones first.

    `partials` is how many partial results there will be.
    """

    tiles: np.ndarray
    singles: np.ndarray
    partials: int

    def table(self) -> np.ndarray:
        """What the kernels read."""
        header = _rows(len(self.tiles), len(self.singles))
        return np.concatenate([header, self.tiles, self.singles])


def divide(
    counts: list[int],
    contexts: list[int],
    queries: int,
    keys: int,
    split: int,
    most: int,
    window: int | None,
) -> Division:
    """Cut a step whose sequences add `counts` tokens and then have `contexts`.

    A prompt tile has up to `queries` queries and all their keys. The keys of a sequence that adds
    one token are cut into splits of `split`, or of the least multiple of it with which there are no
    more than `most`. First keys are multiples of `keys`.
    """
    count, context = np.array(counts), np.array(contexts)
    token = np.cumsum(count) - count
    many, single = np.flatnonzero(count > 1), np.flatnonzero(count == 1)

    sequence, step = _spread(many, -(-count[many] // queries))
    offset = step * queries
    position = (context - count)[sequence] + offset
    taken = np.minimum(queries, count[sequence] - offset)
    first = _first_key(position, keys, window)
    tiles = _rows(sequence, token[sequence] + offset, taken, position, first, position + taken)

    last = context[single] - 1
    begin = _first_key(last, keys, window)
    size = -(-(last + 1 - begin) // (split * most)) * split
    splits = -(-(last + 1 - begin) // size)
    partials = np.where(splits > 1, splits, 0)
    first_partial = np.cumsum(partials) - partials
    which, step = _spread(np.arange(len(single)), splits)
    cut = begin[which] + step * size[which]
    singles = _rows(
        single[which],
        token[single[which]],
        splits[which],
        last[which],
        cut,
        np.minimum(cut + size[which], last[which] + 1),
        np.where(partials[which] > 0, first_partial[which] + step, -1),
        first_partial[which],
    )
    return Division(_longest_first(tiles), _longest_first(singles), int(partials.sum()))


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
