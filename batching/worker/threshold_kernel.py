"""The least logit that top-k and top-p keep, without sorting: a search over the bits of floats.

Floats have the order of their bits, read as integers (negative ones turned round). The threshold of
top-k is the largest number that k logits reach; that of top-p the largest such that the logits that
reach it have a share p of the probability. Either is found two bits a pass over the row, which the
cache holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PIECE = 2048  # logits that a program looks at together


@triton.jit
def search_rows(
    scaled: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    thresholds: tl.tensor,
    COUNT: tl.constexpr,
    PIECE: tl.constexpr,
    BY_COUNT: tl.constexpr,
    BY_SHARE: tl.constexpr,
) -> None:
    """One program a row of `scaled` [rows, COUNT]."""
    row = tl.program_id(0)
    values = scaled + row.to(tl.int64) * COUNT
    highest = tl.full([PIECE], -float("inf"), tl.float32)
    for start in range(0, COUNT, PIECE):
        at = start + tl.arange(0, PIECE)
        highest = tl.maximum(highest, tl.load(values + at, mask=at < COUNT, other=-float("inf")))
    peak = tl.max(highest, 0)
    threshold = tl.full([], -float("inf"), tl.float32)
    if BY_COUNT:
        wanted = tl.load(top_k + row).to(tl.float32)
        threshold = _search(values, peak, wanted, COUNT, PIECE, False)
    if BY_SHARE:
        share = tl.load(top_p + row)
        if share < 1.0:
            total, _, _ = _reaching(values, peak, threshold, peak, peak, COUNT, PIECE, True)
            nucleus = _search(values, peak, share * total, COUNT, PIECE, True)
            threshold = tl.maximum(threshold, tl.minimum(nucleus, peak))
    tl.store(thresholds + row, threshold)


@triton.jit
def _search(
    values: tl.tensor, peak: tl.tensor, wanted: tl.tensor, COUNT: tl.constexpr,
    PIECE: tl.constexpr, WEIGHED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The largest number such that what reaches it counts, or weighs, at least `wanted`."""
    found = wanted.to(tl.uint32) * 0
    for digit in range(16):
        unit = (found * 0 + 1) << (30 - 2 * digit)
        one, two, three = _reaching(
            values, peak, _number(found + unit), _number(found + 2 * unit),
            _number(found + 3 * unit), COUNT, PIECE, WEIGHED,
        )  # fmt: skip
        reached = (one >= wanted).to(tl.uint32) + (two >= wanted) + (three >= wanted)
        found += reached * unit
    number = _number(found)
    return tl.where(number == number, number, -float("inf"))  # below all numbers: not one


@triton.jit
def _reaching(
    values: tl.tensor, peak: tl.tensor, first: tl.tensor, second: tl.tensor, third: tl.tensor,
    COUNT: tl.constexpr, PIECE: tl.constexpr, WEIGHED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """How many of a row, or what weight exp(value - peak) of it, reach three numbers."""
    one = tl.zeros([PIECE], tl.float32)
    two, three = one, one
    for start in range(0, COUNT, PIECE):
        at = start + tl.arange(0, PIECE)
        value = tl.load(values + at, mask=at < COUNT, other=-float("inf"))
        weight = tl.exp(value - peak) if WEIGHED else (at < COUNT).to(tl.float32)
        one += tl.where(value >= first, weight, 0.0)
        two += tl.where(value >= second, weight, 0.0)
        three += tl.where(value >= third, weight, 0.0)
    return tl.sum(one, 0), tl.sum(two, 0), tl.sum(three, 0)


@triton.jit
def _number(order: tl.tensor) -> tl.tensor:
    """The float whose place among all floats is `order`."""
    sign: tl.constexpr = 0x80000000
    every: tl.constexpr = 0xFFFFFFFF
    bits = tl.where(order >= sign, order ^ sign, order ^ every)
    return bits.to(tl.float32, bitcast=True)


def search_threshold(
    scaled: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None
) -> torch.Tensor:
    """As `sampling.find_threshold` over whole rows of contiguous float32 `scaled`: [rows, 1]."""
    rows, count = scaled.shape
    thresholds = scaled.new_empty(rows, 1)
    search_rows[(rows,)](
        scaled, top_k, top_p, thresholds, COUNT=count, PIECE=PIECE,
        BY_COUNT=top_k is not None, BY_SHARE=top_p is not None, num_warps=8,
    )  # fmt: skip
    return thresholds
