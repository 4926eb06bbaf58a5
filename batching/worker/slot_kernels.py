"""The Triton kernels of `triton_slots.py`: a step's inputs made where the layers read them.

Numbers from the host are int32. Nothing is compiled anew for other numbers of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "width"])
def write_at(
    rows: tl.tensor,
    columns: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    PIECE: tl.constexpr,
) -> None:
    """`table[rows, columns] = values`, as int32: new blocks, and sampled tokens."""
    at = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    inside = at < count
    row = tl.load(rows + at, mask=inside, other=0).to(tl.int64)
    column = tl.load(columns + at, mask=inside, other=0)
    value = tl.load(values + at, mask=inside)
    tl.store(table + row * width + column, value.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["count", "width", "table_width"])
def write_inputs(
    slots: tl.tensor,
    starts: tl.tensor,
    rows: tl.tensor,
    tables: tl.tensor,
    tokens: tl.tensor,
    positions: tl.tensor,
    places: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    table_width: tl.tensor,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """A piece of the packed tokens int64: what they are, their positions, and their KV's places."""
    at = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    inside = at < count
    slot = tl.load(slots + at, mask=inside, other=0).to(tl.int64)
    position = tl.load(starts + at, mask=inside, other=0)
    token = tl.load(rows + slot * width + position, mask=inside)
    block = tl.load(tables + slot * table_width + position // BLOCK, mask=inside).to(tl.int64)
    tl.store(tokens + at, token.to(tl.int64), mask=inside)
    tl.store(positions + at, position.to(tl.int64), mask=inside)
    tl.store(places + at, block * BLOCK + position % BLOCK, mask=inside)
