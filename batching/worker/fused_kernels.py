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
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMED: tl.constexpr,
    PAGED: tl.constexpr,
) -> None:
    """One program for a token's KV head and the query heads that share it.

    Queries are normalised and rotated where they are, keys too, or, with `PAGED`, on their way to
    the pages, where values go as well.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim: tl.constexpr = 2 * HALF
    at = tl.arange(0, HALF_PADDED)
    inside = at < HALF
    cosine = tl.load(cos + token * dim + at, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + token * dim + at, mask=inside, other=0.0).to(tl.float32)
    first = qkv + token * ((GROUP + 2) * KV_HEADS * dim)
    row = tl.arange(0, GROUP_PADDED)
    queries = first + (head * GROUP + row)[:, None] * dim + at[None, :]
    shown = (row < GROUP)[:, None] & inside[None, :]
    left, right = _rotated(queries, shown, cosine, sine, query_norm, at, epsilon, HALF, NORMED)
    tl.store(queries, left.to(qkv.dtype.element_ty), mask=shown)
    tl.store(queries + HALF, right.to(qkv.dtype.element_ty), mask=shown)
    key = first + (GROUP * KV_HEADS + head) * dim + at[None, :]
    one = inside[None, :]
    left, right = _rotated(key, one, cosine, sine, key_norm, at, epsilon, HALF, NORMED)
    # As it would be if it went through memory.
    left, right = left.to(qkv.dtype.element_ty), right.to(qkv.dtype.element_ty)
    if PAGED:
        slot = tl.load(slots + token)
        to = ((slot // BLOCK * KV_HEADS + head) * BLOCK + slot % BLOCK) * dim + at[None, :]
        tl.store(key_pages + to, to_stored(left, key_pages), mask=one)
        tl.store(key_pages + to + HALF, to_stored(right, key_pages), mask=one)
        value = first + ((GROUP + 1) * KV_HEADS + head) * dim + at[None, :]
        left, right = tl.load(value, mask=one), tl.load(value + HALF, mask=one)
        tl.store(value_pages + to, to_stored(left, value_pages), mask=one)
        tl.store(value_pages + to + HALF, to_stored(right, value_pages), mask=one)
    else:
        tl.store(key, left, mask=one)
        tl.store(key + HALF, right, mask=one)


@triton.jit
def _rotated(
    source: tl.tensor, shown: tl.tensor, cosine: tl.tensor, sine: tl.tensor, norm: tl.tensor,
    at: tl.tensor, epsilon: tl.tensor, HALF: tl.constexpr, NORMED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Both halves of some heads, rotated, in float32."""
    left = tl.load(source, mask=shown, other=0.0).to(tl.float32)
    right = tl.load(source + HALF, mask=shown, other=0.0).to(tl.float32)
    if NORMED:
        total = tl.sum(left * left + right * right, 1)
        scale = tl.rsqrt(total / (2 * HALF) + epsilon)[:, None]
        dtype: tl.constexpr = source.dtype.element_ty
        inside = at < HALF
        factor = tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)[None, :]
        left = ((left * scale).to(dtype).to(tl.float32) * factor).to(dtype).to(tl.float32)
        factor = tl.load(norm + HALF + at, mask=inside, other=0.0).to(tl.float32)[None, :]
        right = ((right * scale).to(dtype).to(tl.float32) * factor).to(dtype).to(tl.float32)
    cosine, sine = cosine[None, :], sine[None, :]
    return left * cosine - right * sine, right * cosine + left * sine


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
    activated = (gate / (1.0 + tl.exp(-gate))).to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + row * WIDTH + at, (activated * up).to(output.dtype.element_ty), mask=inside)
