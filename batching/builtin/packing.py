"""From documents to rows of token ids that waste next to nothing.

Whole documents are packed (first fit, longest first) into rows of fixed length, so an answer is
never cut off from its question. Attention stays inside a document: each is seen as it will be
when it is served, alone, only at varying positions.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer

from .corpus.chatml import END_OF_TEXT
from .corpus.mix import documents


@dataclass(frozen=True)
class Batch:
    """`ids` int64 [rows, length]; `learned` bool [rows, length], true for tokens to predict;
    `document` int64 [rows, length], which document of its row a token belongs to."""

    ids: torch.Tensor
    learned: torch.Tensor
    document: torch.Tensor

    def visible(self) -> torch.Tensor:
        """bool [rows, 1, length, length]: causal attention within the same document."""
        same = self.document[:, :, None] == self.document[:, None, :]
        return same.tril().unsqueeze(1)


Encoded = tuple[list[int], list[bool]]


def encode(tokenizer: Tokenizer, seed: int, count: int, *, long: bool) -> list[Encoded]:
    """Token ids and learned flags of `count` documents."""
    drawn = list(itertools.islice(documents(seed, long=long), count))
    texts = [text for document in drawn for text, _ in document]
    pieces = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    encoded: list[Encoded] = []
    for document in drawn:
        ids: list[int] = []
        learned: list[bool] = []
        for _, flag in document:
            span = next(pieces).ids
            ids += span
            learned += [flag] * len(span)
        encoded.append((ids, learned))
    return encoded


def pack(encoded: list[Encoded], length: int) -> list[list[Encoded]]:
    """First-fit-decreasing bins of at most `length` tokens; longer documents are left out."""
    bins: list[list[Encoded]] = []
    free: list[int] = []
    for document in sorted(encoded, key=lambda d: len(d[0]), reverse=True):
        size = len(document[0])
        if size > length:
            continue
        for i, room in enumerate(free):
            if size <= room:
                bins[i].append(document)
                free[i] -= size
                break
        else:
            bins.append([document])
            free.append(length - size)
    return bins


def batches(
    tokenizer: Tokenizer, seed: int, rows: int, length: int, *, long: bool = False
) -> Iterator[Batch]:
    """Endless batches of `rows` rows of `length` tokens, the same for the same seed."""
    pad = tokenizer.token_to_id(END_OF_TEXT)
    if pad is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT} token")
    rng = Random(seed)
    waiting: list[list[Encoded]] = []
    for chunk in itertools.count():
        count = 128 if long else 2000
        waiting += pack(encode(tokenizer, seed * 1_000_003 + chunk, count, long=long), length)
        rng.shuffle(waiting)
        while len(waiting) >= rows:
            yield _batch([waiting.pop() for _ in range(rows)], length, pad, rng)


def _batch(bins: list[list[Encoded]], length: int, pad: int, rng: Random) -> Batch:
    shape = (len(bins), length)
    batch = Batch(
        torch.full(shape, pad),
        torch.zeros(shape, dtype=torch.bool),
        torch.full(shape, -1),
    )
    for row, packed in enumerate(bins):
        rng.shuffle(packed)
        start = 0
        for number, (ids, learned) in enumerate(packed):
            end = start + len(ids)
            batch.ids[row, start:end] = torch.tensor(ids)
            batch.learned[row, start:end] = torch.tensor(learned)
            batch.document[row, start:end] = number
            start = end
    return batch
