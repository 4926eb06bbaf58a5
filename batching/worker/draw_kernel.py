"""Drawing tokens on GPUs in Triton: without sorting, intermediate rows or waiting.

What top-k and top-p leave of a row are the logits that reach a certain one of them: the kth
largest, or the largest such that what reaches it has a share p of the probability. It is searched
between two logits of the row, by halving, until they are the same; each try is a pass over the row,
which the cache holds. Then the largest sum of a kept logit and its noise (`noise.py`) is taken, by
as many programs as the device has room for, since noise takes longer than reading.

The search in a row is one program's, which adds in a fixed order; which sum is largest is the same
however a row is divided: a draw does not depend on the batch. Equal logits are kept or left
together. Against `sampling.draw` on the CPU, sums are rounded differently: where a share is met to
the last digits, what is kept may end one logit sooner or later.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from batching.worker import noise
from batching.worker.sampling import Draws

PIECE = 8192  # logits that a searching program looks at together
WARPS = 16
NOISE_PIECE = 1024  # and one that makes noise for what is kept
MOST_PARTS = 128  # of a row
PROGRAMS = 2048  # that make noise: what a large GPU runs at once
LOG2_E = tl.constexpr(1.4426950408889634)
# Of a vocabulary of a million, what is so far below the largest has together less than a float32
# can be short of 1.
SPAN = tl.constexpr(32.0)
INFINITY = tl.constexpr(float("inf"))
GOLDEN = tl.constexpr(noise.GOLDEN_32 & 0xFFFFFFFF)
ROUND_1 = tl.constexpr(noise.ROUND_1)
ROUND_2 = tl.constexpr(noise.ROUND_2 & 0xFFFFFFFF)
BELOW_ONE = tl.constexpr(noise.BELOW_ONE)
STEP = tl.constexpr(1 / noise.UNIFORM_STEPS)


@triton.jit
def find_bounds(
    logits: tl.tensor,
    rows: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    bounds: tl.tensor,
    COUNT: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """The least logit that each draw keeps: a program a draw."""
    draw = tl.program_id(0)
    row = logits + tl.load(rows + draw).to(tl.int64) * COUNT
    heat = tl.load(temperature + draw)
    count, share, least = tl.load(top_k + draw), tl.load(top_p + draw), tl.load(min_p + draw)
    bound, floor = -INFINITY, -INFINITY
    if least > 0.0:
        floor = tl.log(least)
    if (count < COUNT) | (share < 1.0) | (floor > -INFINITY):
        bound = least_kept(row, heat, count, share, floor, COUNT, PIECE)
    tl.store(bounds + draw, bound)


@triton.jit(do_not_specialize=["parts", "is_bounded"])
def take_noisiest(
    logits: tl.tensor,
    rows: tl.tensor,
    temperature: tl.tensor,
    keys: tl.tensor,
    bounds: tl.tensor,
    sums: tl.tensor,
    found: tl.tensor,
    parts: tl.tensor,
    is_bounded: tl.tensor,
    COUNT: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """The largest sum of logit and noise in a part of each draw's row, and whose it is."""
    draw, part = tl.program_id(0), tl.program_id(1)
    row = logits + tl.load(rows + draw).to(tl.int64) * COUNT
    heat, bound = tl.load(temperature + draw), -INFINITY
    if is_bounded != 0:
        bound = tl.load(bounds + draw)
    first, second = tl.load(keys + 2 * draw), tl.load(keys + 2 * draw + 1)
    best = tl.full([PIECE], -INFINITY, tl.float32)
    chosen = tl.zeros([PIECE], tl.int32)
    for start in range(part * PIECE, COUNT, parts * PIECE):
        at = start + tl.arange(0, PIECE)
        value = tl.load(row + at, mask=at < COUNT, other=-INFINITY).to(tl.float32)
        if tl.max(value, 0) >= bound:  # most pieces have nothing that is kept
            noisy = tl.div_rn(value, heat + tl.zeros_like(value)) + _gumbel(at, first, second)
            is_better = (value >= bound) & (noisy > best)
            best = tl.where(is_better, noisy, best)
            chosen = tl.where(is_better, at, chosen)
    largest = tl.max(best, 0)
    tl.store(sums + draw * parts + part, largest)
    token = tl.min(tl.where(best == largest, chosen, COUNT - 1), 0)
    tl.store(found + draw * parts + part, token)


@triton.jit(do_not_specialize=["parts"])
def write_winners(
    rows: tl.tensor,
    sums: tl.tensor,
    found: tl.tensor,
    tokens: tl.tensor,
    parts: tl.tensor,
    MOST: tl.constexpr,
) -> None:
    """The token of the largest of a draw's sums, the first of equal ones."""
    draw, part = tl.program_id(0), tl.arange(0, MOST)
    best = tl.load(sums + draw * parts + part, mask=part < parts, other=-INFINITY)
    token = tl.load(found + draw * parts + part, mask=part < parts, other=0x7FFFFFFF)
    token = tl.min(tl.where(best == tl.max(best, 0), token, 0x7FFFFFFF), 0)
    tl.store(tokens + tl.load(rows + draw), token.to(tl.int64))


@triton.jit
def least_kept(
    row: tl.tensor, heat: tl.tensor, count: tl.tensor, share: tl.tensor, floor: tl.tensor,
    COUNT: tl.constexpr, PIECE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The least logit of a row that is kept; `floor` is the logarithm of min-p.

    Top-p counts probabilities after the others.
    """
    high = tl.full([PIECE], -INFINITY, tl.float32)
    low = tl.full([PIECE], INFINITY, tl.float32)
    for start in range(0, COUNT, PIECE):
        at = start + tl.arange(0, PIECE)
        value = tl.load(row + at, mask=at < COUNT, other=-INFINITY).to(tl.float32)
        high = tl.maximum(high, value)
        low = tl.minimum(low, tl.where(value > -INFINITY, value, INFINITY))
    peak, least = tl.max(high, 0), tl.min(low, 0)
    bound, scale = peak + floor * heat, LOG2_E / heat
    if count < COUNT:
        wanted = count.to(tl.float32)
        kth = _search(row, least, peak, wanted, peak, scale, COUNT, PIECE, False)
        bound = tl.maximum(bound, kth)
    if share < 1.0:
        total = tl.zeros([PIECE], tl.float32)
        low = tl.full([PIECE], INFINITY, tl.float32)
        for start in range(0, COUNT, PIECE):
            at = start + tl.arange(0, PIECE)
            value = tl.load(row + at, mask=at < COUNT, other=-INFINITY).to(tl.float32)
            total += tl.where(value >= bound, tl.exp2((value - peak) * scale), 0.0)
            is_near = value >= tl.maximum(bound, peak - SPAN * heat)
            low = tl.minimum(low, tl.where(is_near, value, INFINITY))
        wanted = share * tl.sum(total, 0)
        bound = _search(row, tl.min(low, 0), peak, wanted, peak, scale, COUNT, PIECE, True)
    return bound


@triton.jit
def _search(
    row: tl.tensor, least: tl.tensor, greatest: tl.tensor, wanted: tl.tensor, peak: tl.tensor,
    scale: tl.tensor, COUNT: tl.constexpr, PIECE: tl.constexpr, WEIGHED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The least logit between two such that less than `wanted` is above it.

    A logit counts as 1, or weighs exp2((logit - peak) * scale). In each pass one end moves to the
    next logit beyond the middle.
    """
    while least < greatest:
        middle = least + (greatest - least) * 0.5
        middle = tl.where(middle < greatest, middle, least)  # rounded, or not finite
        weight = tl.zeros([PIECE], tl.float32)
        above = tl.full([PIECE], INFINITY, tl.float32)
        below = tl.full([PIECE], -INFINITY, tl.float32)
        for start in range(0, COUNT, PIECE):
            at = start + tl.arange(0, PIECE)
            value = tl.load(row + at, mask=at < COUNT, other=-INFINITY).to(tl.float32)
            is_above = value > middle
            each = tl.exp2((value - peak) * scale) if WEIGHED else 1.0
            weight += tl.where(is_above, each, 0.0)
            above = tl.minimum(above, tl.where(is_above, value, INFINITY))
            below = tl.maximum(below, tl.where(is_above, -INFINITY, value))
        if tl.sum(weight, 0) >= wanted:
            least = tl.min(above, 0)
        else:
            greatest = tl.max(below, 0)
    return greatest


@triton.jit
def _gumbel(token: tl.tensor, first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """`noise.gumbel`: the same bits, and logarithms up to their last digits."""
    x = token.to(tl.uint32) * GOLDEN + first.to(tl.uint32, bitcast=True)
    x ^= x >> 16
    x = x * ROUND_1 + second.to(tl.uint32, bitcast=True)
    x ^= x >> 15
    x *= ROUND_2
    x ^= x >> 16
    uniform = ((x & 0x7FFFFFFF).to(tl.float32) + 0.5) * STEP
    uniform = tl.minimum(uniform, BELOW_ONE)
    # log1p(-uniform): what the difference loses in rounding, the quotient gives back.
    rest = 1.0 - uniform
    lost = tl.where(rest < 1.0, 1.0 - rest, 1.0)
    exponential = tl.where(rest < 1.0, -tl.log(rest) * (uniform / lost), uniform)
    return -tl.log(exponential)


def draw_into(tokens: torch.Tensor, logits: torch.Tensor, draws: Draws) -> None:
    """Set `tokens` int64 [n] of the draws' rows, from contiguous logits [n, vocab]."""
    count, heat, drawn = logits.shape[1], draws.temperature, len(draws.rows)
    is_bounded = any(limit is not None for limit in (draws.top_k, draws.top_p, draws.min_p))
    bounds = torch.empty_like(heat) if is_bounded else heat
    if is_bounded:
        # What no row has is switched off, not left out: one kernel is compiled, before it is used.
        top_k = torch.full_like(draws.rows, count) if draws.top_k is None else draws.top_k
        top_p = torch.ones_like(heat) if draws.top_p is None else draws.top_p
        min_p = torch.zeros_like(heat) if draws.min_p is None else draws.min_p
        find_bounds[(drawn,)](
            logits, draws.rows, heat, top_k, top_p, min_p, bounds,
            COUNT=count, PIECE=PIECE, num_warps=WARPS,
        )  # fmt: skip
    parts = max(1, min(MOST_PARTS, triton.cdiv(count, NOISE_PIECE), PROGRAMS // drawn))
    sums = heat.new_empty(drawn, parts)
    found = torch.empty_like(sums, dtype=torch.int32)
    take_noisiest[drawn, parts](
        logits, draws.rows, heat, draws.keys, bounds, sums, found, parts,
        int(is_bounded), COUNT=count, PIECE=NOISE_PIECE,
    )  # fmt: skip
    write_winners[(drawn,)](draws.rows, sums, found, tokens, parts, MOST=MOST_PARTS, num_warps=1)
