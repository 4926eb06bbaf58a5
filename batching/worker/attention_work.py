"""How a step's attention is cut into pieces of work for the Triton kernels: numbers, no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FIELDS = 8  # int32 of a row; `attention_kernels.py` says what they are
_NO_ROWS = np.empty((0, FIELDS), np.int32)


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
        tiles, singles = len(self.tiles), len(self.singles)
        table = np.zeros((1 + tiles + singles, FIELDS), np.int32)
        table[0, :2] = tiles, singles
        table[1 : 1 + tiles], table[1 + tiles :] = self.tiles, self.singles
        return table


def divide(
    counts: Sequence[int] | np.ndarray,
    contexts: Sequence[int] | np.ndarray,
    table_rows: np.ndarray | None = None,
    *,
    queries: int,
    keys: int,
    split: int,
    most: int,
    window: int | None,
) -> Division:
    """Cut a step whose sequences add `counts` tokens and then have `contexts`.

    A prompt tile has up to `queries` queries and all their keys. The keys of a sequence that adds
    one token are cut into splits of `split`, or of the least multiple of it with which there are no
    more than `most`. First keys are multiples of `keys`. `table_rows` are the sequences' rows of
    the block tables, if they are not in order.
    """
    count, context = np.asarray(counts), np.asarray(contexts)
    table = np.arange(len(count)) if table_rows is None else table_rows
    token = np.cumsum(count) - count
    single = np.flatnonzero(count == 1)
    tiles = _NO_ROWS
    if len(single) < len(count):
        many = np.flatnonzero(count > 1)
        sequence, step = spread(many, -(-count[many] // queries))
        offset = step * queries
        position = (context - count)[sequence] + offset
        taken = np.minimum(queries, count[sequence] - offset)
        first, end = _first_key(position, keys, window), position + taken
        tiles = _rows(table[sequence], token[sequence] + offset, taken, position, first, end)
        context, table, token = context[single], table[single], token[single]

    last = context - 1
    begin = _first_key(last, keys, window)
    size = -(-(context - begin) // (split * most)) * split
    splits = -(-(context - begin) // size)
    if splits.max(initial=1) == 1:
        singles = _rows(table, token, 1, last, begin, context, -1)
        return Division(_longest_first(tiles), _longest_first(singles), 0)
    partials = np.where(splits > 1, splits, 0)
    first_partial = np.cumsum(partials) - partials
    which, step = spread(np.arange(len(single)), splits)
    cut = begin[which] + step * size[which]
    singles = _rows(
        table[which],
        token[which],
        splits[which],
        last[which],
        cut,
        np.minimum(cut + size[which], context[which]),
        np.where(partials[which] > 0, first_partial[which] + step, -1),
        first_partial[which],
    )
    return Division(_longest_first(tiles), _longest_first(singles), int(partials.sum()))


def spread(values: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
    return rows if len(rows) < 2 else rows[np.argsort(rows[:, 4] - rows[:, 5], kind="stable")]
