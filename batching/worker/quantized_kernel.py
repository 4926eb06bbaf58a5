"""A product of few rows with weights of 8 or 4 bits, which become numbers in registers (Triton)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from batching.worker.device import float32_products

# By rows of a tile: outputs and inputs of a tile, stages, warps. Chosen by what the compiler says
# of sm_90; not yet measured on a GPU.
TILES = {16: (32, 128, 5, 4), 32: (32, 128, 5, 4), 64: (64, 64, 3, 4)}


@triton.jit
def product(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    lows: tl.tensor,
    bias: tl.tensor,
    output: tl.tensor,
    rows: tl.tensor,
    x_row: tl.tensor,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    HALVES: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """A tile of the output [rows, OUTPUTS]. `HALVES`: two codes to a byte, in groups (int4)."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    is_row, is_column = row < rows, column < OUTPUTS
    source = x + row.to(tl.int64)[:, None] * x_row
    width: tl.constexpr = INPUTS // 2 if HALVES else INPUTS  # bytes
    weights = codes + column.to(tl.int64)[:, None] * width
    groups = column * (INPUTS // GROUP)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, width, DEPTH, num_stages=STAGES):
        at = start + depth
        inside = at < width
        wanted = is_column[:, None] & inside[None, :]
        code = tl.load(weights + at[None, :], mask=wanted, other=0.0 if not HALVES else 0)
        given = is_row[:, None] & inside[None, :]
        left = tl.load(source + at[None, :], mask=given, other=0.0)
        if HALVES:
            right = tl.load(source + width + at[None, :], mask=given, other=0.0)
            low = _weights(code & 15, scales, lows, groups + start // GROUP, is_column, x)
            high = _weights(
                code >> 4, scales, lows, groups + (width + start) // GROUP, is_column, x
            )
            total = tl.dot(left, tl.trans(low), total, input_precision=PRECISION)
            total = tl.dot(right, tl.trans(high), total, input_precision=PRECISION)
        else:
            weight = code.to(tl.float16).to(x.dtype.element_ty)  # exact; Ada lacks fp8 to bfloat16
            total = tl.dot(left, tl.trans(weight), total, input_precision=PRECISION)
    if not HALVES:
        total *= tl.load(scales + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if BIASED:
        total += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    to = output + row.to(tl.int64)[:, None] * OUTPUTS + column[None, :]
    tl.store(to, total.to(output.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _weights(
    code: tl.tensor, scales: tl.tensor, lows: tl.tensor, group: tl.tensor, is_column: tl.tensor,
    x: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Weights of one group a column."""
    scale = tl.load(scales + group, mask=is_column, other=0.0).to(tl.float32)
    low = tl.load(lows + group, mask=is_column, other=0.0).to(tl.float32)
    return (code.to(tl.float32) * scale[:, None] + low[:, None]).to(x.dtype.element_ty)


def constants(rows: int, group: int, *, halves: bool) -> dict[str, Any]:
    """What `product` is compiled for, besides sizes, precision and bias."""
    tile = next((tile for tile in TILES if rows <= tile), max(TILES))
    columns, depth, stages, warps = TILES[tile]
    # A tile of int4 inputs lies within one group, in either half.
    depth = min(depth, group // 2 if halves else depth)
    return {"ROWS": tile, "COLUMNS": columns, "DEPTH": depth, "STAGES": stages, "HALVES": halves,
            "num_warps": warps}  # fmt: skip


def multiply(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    lows: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`x @ weight.T + bias` for rows [n, inputs]; the rest as in `quantized.QuantizedLinear`."""
    outputs, inputs = len(codes), x.shape[1]
    given = constants(len(x), group, halves=lows is not None)
    output = torch.empty(len(x), outputs, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(outputs, given["COLUMNS"]), triton.cdiv(len(x), given["ROWS"]))
    product[grid](
        x, codes, scales, lows, bias, output, len(x), x.stride(0),
        OUTPUTS=outputs, INPUTS=inputs, GROUP=group, BIASED=bias is not None,
        PRECISION=float32_products(x.device), **given,
    )  # fmt: skip
    return output
