"""Products of few rows with plain weights (Triton): of one row at the speed of memory.

Such a product is its weights read once. A program has a tile of outputs for all rows, and reads
enough at once to keep memory busy. What stands before and after a product in a layer is part of it:
RMSNorm, which every program computes anew (a row is some KB, in the caches); the activation of gate
and up; adding to the residual. `is_for` says where this was faster than cuBLAS and kernels of their
own, on an H200.

Weights do not depend on the kernel before, so where the GPU can (`starts_early`) the first of them
are read while that one still runs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from batching.worker.attention_triton import PLENTY, padded
from batching.worker.device import shared_memory
from batching.worker.fused_kernels import gated

EARLY = True  # whether kernels may start before the one before them has ended
VECTOR = tl.constexpr(8)  # numbers that a thread has of a piece of a row
LINE = tl.constexpr(64)  # numbers of 16 bits in a line of the cache


@triton.jit(do_not_specialize=["rows"])
def few_rows(
    x: tl.tensor, norm: tl.tensor, weight: tl.tensor, bias: tl.tensor, output: tl.tensor,
    rows: tl.tensor, epsilon: tl.tensor, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PIECE: tl.constexpr, PARTS: tl.constexpr,
    NORMED: tl.constexpr, BIASED: tl.constexpr, PAIRED: tl.constexpr, ADDED: tl.constexpr,
    DOTS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """`TILE` lines of the weights, times all rows [rows, INPUTS], a `PIECE` of them at a time.

    `NORMED`: of rows that are normalised first. `PAIRED`: the weights are those of gate, then of
    up, and an output is `silu(gate) * up`; in a tile they alternate. `ADDED`: to the output.
    `DOTS`: by tensor cores, in a pipeline of `STAGES`, of rows as they are; else from registers.
    `PARTS` of a piece are summed up apart until the end.
    """
    tl.static_assert(not (DOTS and NORMED))
    line = tl.program_id(0) * TILE + tl.arange(0, TILE)
    line = tl.minimum(line, OUTPUTS * (2 if PAIRED else 1) - 1)
    source = (line % 2 * OUTPUTS + line // 2 if PAIRED else line).to(tl.int64) * INPUTS
    weights = weight + source[:, None] + tl.arange(0, PIECE)[None, :]
    row = tl.arange(0, ROWS)
    given = x + (tl.minimum(row, rows - 1) * INPUTS)[:, None] + tl.arange(0, PIECE)[None, :]
    if not DOTS:
        w = _piece(weights, 0, INPUTS, PIECE)
        factors = ((norm if NORMED else x) + tl.arange(0, PIECE))[None, :]
        factor = _piece(factors, 0, INPUTS, PIECE) if NORMED else w
    elif EARLY:
        _ask(weight + source[:, None], INPUTS, PIECE, STAGES)
    if BIASED:
        constant = tl.load(bias + line).to(tl.float32)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    taken: tl.constexpr = TILE // 2 if PAIRED else TILE
    column = tl.program_id(0) * taken + tl.arange(0, taken)
    place = output + column[:, None] + row[None, :] * OUTPUTS
    shown = (column < OUTPUTS)[:, None] & (row < rows)[None, :]
    if ADDED:  # not by the unit's own cache, in which neighbours' outputs would be old
        before = tl.load(place, mask=shown, other=0.0, cache_modifier=".cg").to(tl.float32)
    if DOTS:
        result = _multiplied(weights, given, INPUTS, ROWS, TILE, PIECE, PARTS, STAGES)
    else:
        result = _summed(weights, given, w, factors, factor, epsilon, INPUTS, ROWS, TILE, PIECE,
                         PARTS, NORMED)  # fmt: skip
    if BIASED:
        result += constant[:, None]
    if PAIRED:
        result = _activated(result.to(output.dtype.element_ty), ROWS, taken)
    if ADDED:
        result += before
    tl.store(place, result.to(output.dtype.element_ty), mask=shown)


@triton.jit
def _piece(
    lines: tl.tensor, start: tl.tensor, INPUTS: tl.constexpr, PIECE: tl.constexpr
) -> tl.tensor:
    """[lines, PIECE] from `start` on, with zeros for what is not there."""
    if INPUTS % PIECE == 0:
        found = tl.load(lines + start)
    else:
        inside = start + tl.arange(0, PIECE) < INPUTS
        found = tl.load(lines + start, mask=inside[None, :], other=0.0)
    return found


@triton.jit
def _ask(lines: tl.tensor, INPUTS: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr) -> None:
    """Have the second-level cache read what the first stages will want."""
    asked: tl.constexpr = min(INPUTS, PIECE * STAGES)
    for start in tl.static_range(0, asked, PIECE):
        at = tl.minimum(start + tl.arange(0, PIECE // LINE) * LINE, INPUTS - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [lines + at[None, :]], tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _multiplied(
    weights: tl.tensor, given: tl.tensor, INPUTS: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, PIECE: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Products [TILE, ROWS] by tensor cores."""
    depth: tl.constexpr = PIECE // PARTS
    total = tl.zeros([PARTS, ROWS, TILE], tl.float32)
    for start in tl.range(0, INPUTS, PIECE, num_stages=STAGES):
        w, v = _piece(weights, start, INPUTS, PIECE), _piece(given, start, INPUTS, PIECE)
        v = tl.trans(tl.reshape(v, [ROWS, PARTS, depth]), 1, 0, 2)
        w = tl.trans(tl.reshape(w, [TILE, PARTS, depth]), 1, 2, 0)
        total = tl.dot(v, w, total)
    return tl.trans(tl.sum(total, 0))


@triton.jit
def _summed(
    weights: tl.tensor, given: tl.tensor, w: tl.tensor, factors: tl.tensor, factor: tl.tensor,
    epsilon: tl.tensor, INPUTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    PIECE: tl.constexpr, PARTS: tl.constexpr, NORMED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Products [TILE, ROWS], whose first weights and factors of the norm have been asked for."""
    if NORMED:
        scale = _scales(given, epsilon, INPUTS, ROWS, PIECE)
    total = tl.zeros([TILE, ROWS, PARTS], tl.float32)
    v = _piece(given, 0, INPUTS, PIECE)
    for start in tl.range(PIECE, INPUTS, PIECE, num_stages=1):
        w_next = _piece(weights, start, INPUTS, PIECE)
        v_next = _piece(given, start, INPUTS, PIECE)
        if NORMED:
            v = _normed(v, scale, factor)
            factor = _piece(factors, start, INPUTS, PIECE)
        total += _products(w, v, ROWS, TILE, PIECE, PARTS)
        w, v = w_next, v_next
    if NORMED:
        v = _normed(v, scale, factor)
    return tl.sum(total + _products(w, v, ROWS, TILE, PIECE, PARTS), 2)


@triton.jit
def _scales(
    given: tl.tensor, epsilon: tl.tensor, INPUTS: tl.constexpr, ROWS: tl.constexpr,
    PIECE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What each row is multiplied by to be normalised."""
    squares = tl.zeros([ROWS, PIECE // VECTOR], tl.float32)
    for start in tl.static_range(0, INPUTS, PIECE):
        v = _piece(given, start, INPUTS, PIECE).to(tl.float32)
        squares += tl.sum(tl.reshape(v * v, [ROWS, PIECE // VECTOR, VECTOR]), 2)
    return tl.rsqrt(tl.sum(squares, 1) / INPUTS + epsilon)


@triton.jit
def _normed(v: tl.tensor, scale: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """A piece of the rows as it is multiplied, rounded as `fused_kernels.normalize` does."""
    scaled = (v.to(tl.float32) * scale[:, None]).to(v.dtype).to(tl.float32)
    return (scaled * factor.to(tl.float32)).to(v.dtype)


@triton.jit
def _products(
    w: tl.tensor, v: tl.tensor, ROWS: tl.constexpr, TILE: tl.constexpr, PIECE: tl.constexpr,
    PARTS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Those of a piece, [TILE, ROWS, PARTS].

    Reshaped rather than expanded, numbers stay in the registers that they were read to.
    """
    v = tl.reshape(v, [1, ROWS, PARTS, PIECE // PARTS]).to(tl.float32)
    w = tl.reshape(w, [TILE, 1, PARTS, PIECE // PARTS]).to(tl.float32)
    return tl.sum(w * v, 3)


@triton.jit
def _activated(lines: tl.tensor, ROWS: tl.constexpr, PAIRS: tl.constexpr) -> tl.tensor:
    """`silu(gate) * up`, of lines that alternate."""
    gate, up = tl.split(tl.trans(tl.reshape(lines, [PAIRS, 2, ROWS]), 0, 2, 1))
    return gated(gate.to(tl.float32), up.to(tl.float32), lines.dtype)


SUMMED, MOST = 4, 16  # rows: up to how many without tensor cores, and at all
NORMED = 4096  # numbers of all rows up to which every program may normalise them
SHORT = 3072  # inputs up to which several rows are for this kernel
WHOLE = 4096  # inputs up to which a row is one piece

_shared = cache(shared_memory)


def is_for(x: torch.Tensor, linear: nn.Module, *, normed: bool = False) -> bool:
    """Whether `multiply` is for these rows and this layer."""
    rows, inputs = x.shape
    if type(linear) is not nn.Linear or rows > (SUMMED if normed or x.itemsize == 4 else MOST):
        return False
    return rows == 1 or (rows * inputs <= NORMED if normed else inputs <= SHORT)


@cache
def starts_early(device: torch.device) -> bool:
    """Whether kernels can be told to start before the one before them has ended."""
    is_nvidia = device.type == "cuda" and not torch.version.hip
    return EARLY and is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0)


def constants(rows: int, inputs: int, shared: int) -> dict[str, Any]:
    """What `few_rows` is compiled for, given a unit's bytes of shared memory, besides the rest.

    The sizes are the best of some that an H200 was given.
    """
    if rows > SUMMED:
        return {"ROWS": MOST, "TILE": 8, "PIECE": 512, "PARTS": 4, "DOTS": True, "num_warps": 4,
                "STAGES": 4 if shared >= PLENTY else 2}  # fmt: skip
    piece = padded(inputs, 1024) if inputs <= WHOLE else 2048
    return {"ROWS": padded(rows, 1), "TILE": 8 if inputs <= 2048 else 4, "PIECE": piece,
            "PARTS": piece // VECTOR.value, "DOTS": False, "num_warps": min(8, piece // 256),
            "STAGES": 1}  # fmt: skip


def multiply(
    x: torch.Tensor,
    linear: Any,
    norm: Any = None,
    *,
    paired: bool = False,
    added_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear(norm(x))` of rows that it `is_for`, added in place to `added_to` where that is given.

    `paired`: `linear` has the outputs of gate and up, and the result is `silu(gate) * up`.
    """
    outputs, inputs = linear.weight.shape
    outputs = outputs // 2 if paired else outputs
    output = x.new_empty(len(x), outputs) if added_to is None else added_to
    early = starts_early(x.device)
    given = constants(len(x), inputs, _shared(x.device))
    lines = outputs * (2 if paired else 1)
    few_rows[(triton.cdiv(lines, given["TILE"]),)](
        x, None if norm is None else norm.weight, linear.weight, linear.bias, output, len(x),
        0.0 if norm is None else norm.epsilon,
        INPUTS=inputs, OUTPUTS=outputs, NORMED=norm is not None, BIASED=linear.bias is not None,
        PAIRED=paired, ADDED=added_to is not None, EARLY=early,
        **given, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return output
