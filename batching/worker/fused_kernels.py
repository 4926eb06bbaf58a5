"""The Triton kernels of `fused_layers.py`: normalise, rotate and write, activate.

Each computes in float32 and rounds where transformers' modules round, but for the rotation, which
they round three times.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batching.worker.attention_kernels import to_stored


@triton.jit
def normalize(
    x: tl.tensor,
    weight: tl.tensor,
    output: tl.tensor,
    epsilon: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """One program a row: `weight * x / sqrt(mean(x²) + epsilon)`."""
    at = tl.arange(0, PADDED)
    inside = at < WIDTH
    row = tl.program_id(0).to(tl.int64) * WIDTH
    values = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / WIDTH + epsilon)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    normed = (values * scale).to(x.dtype.element_ty).to(tl.float32)
    tl.store(output + row + at, (normed * factor).to(output.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_write(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    key_pages: tl.tensor,
    value_pages: tl.tensor,
    slots: tl.tensor,
    epsilon: tl.tensor,
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERIES_PADDED: tl.constexpr,
    KEYS_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMED: tl.constexpr,
    PAGED: tl.constexpr,
) -> None:
    """One program for a token.

    Queries are normalised and rotated where they are, keys too, or, with `PAGED`, on their way to
    the pages, where values go as well.
    """
    token = tl.program_id(0).to(tl.int64)
    dim: tl.constexpr = 2 * HALF
    dtype: tl.constexpr = qkv.dtype.element_ty
    at = tl.arange(0, HALF_PADDED)[None, :]
    row, head = tl.arange(0, QUERIES_PADDED)[:, None], tl.arange(0, KEYS_PADDED)[:, None]
    queries = qkv + token * ((QUERIES + 2 * KV_HEADS) * dim) + row * dim + at
    keys = qkv + token * ((QUERIES + 2 * KV_HEADS) * dim) + (QUERIES + head) * dim + at
    asked, kept = (row < QUERIES) & (at < HALF), (head < KV_HEADS) & (at < HALF)
    # All at once, before anything is stored.
    query_left = tl.load(queries, mask=asked, other=0.0)
    query_right = tl.load(queries + HALF, mask=asked, other=0.0)
    key_left = tl.load(keys, mask=kept, other=0.0)
    key_right = tl.load(keys + HALF, mask=kept, other=0.0)
    cosine = tl.load(cos + token * dim + at, mask=at < HALF, other=0.0).to(tl.float32)
    sine = tl.load(sin + token * dim + at, mask=at < HALF, other=0.0).to(tl.float32)
    if PAGED:
        values = keys + KV_HEADS * dim
        value_left, value_right = tl.load(values, mask=kept), tl.load(values + HALF, mask=kept)
        slot = tl.load(slots + token)
    left, right = _normed(query_left, query_right, query_norm, at, epsilon, HALF, NORMED)
    tl.store(queries, (left * cosine - right * sine).to(dtype), mask=asked)
    tl.store(queries + HALF, (right * cosine + left * sine).to(dtype), mask=asked)
    left, right = _normed(key_left, key_right, key_norm, at, epsilon, HALF, NORMED)
    # As it would be if it went through memory.
    key_left = (left * cosine - right * sine).to(dtype)
    key_right = (right * cosine + left * sine).to(dtype)
    if PAGED:
        to = ((slot // BLOCK * KV_HEADS + head) * BLOCK + slot % BLOCK) * dim + at
        tl.store(key_pages + to, to_stored(key_left, key_pages), mask=kept)
        tl.store(key_pages + to + HALF, to_stored(key_right, key_pages), mask=kept)
        tl.store(value_pages + to, to_stored(value_left, value_pages), mask=kept)
        tl.store(value_pages + to + HALF, to_stored(value_right, value_pages), mask=kept)
    else:
        tl.store(keys, key_left, mask=kept)
        tl.store(keys + HALF, key_right, mask=kept)


@triton.jit
def _normed(
    left: tl.tensor, right: tl.tensor, norm: tl.tensor, at: tl.tensor, epsilon: tl.tensor,
    HALF: tl.constexpr, NORMED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Both halves of some heads, normalised if that is done, in float32."""
    dtype: tl.constexpr = left.dtype
    left, right = left.to(tl.float32), right.to(tl.float32)
    if NORMED:
        total = tl.sum(left * left + right * right, 1)
        scale = tl.rsqrt(total / (2 * HALF) + epsilon)[:, None]
        factor = tl.load(norm + at, mask=at < HALF, other=0.0).to(tl.float32)
        left = ((left * scale).to(dtype).to(tl.float32) * factor).to(dtype).to(tl.float32)
        factor = tl.load(norm + HALF + at, mask=at < HALF, other=0.0).to(tl.float32)
        right = ((right * scale).to(dtype).to(tl.float32) * factor).to(dtype).to(tl.float32)
    return left, right


@triton.jit
def activate(
    gate_up: tl.tensor, output: tl.tensor, WIDTH: tl.constexpr, PIECE: tl.constexpr
) -> None:
    """`silu(gate) * up`: one program for a piece of a row [2 * WIDTH]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = at < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = output.dtype.element_ty
    tl.store(output + row * WIDTH + at, gated(gate, up, dtype).to(dtype), mask=inside)


@triton.jit
def gated(gate: tl.tensor, up: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """`silu(gate) * up` of float32, the first rounded to `dtype`."""
    return (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
