"""The Triton kernels of `attention_triton.py`: write keys and values, attend, join splits.

Pages are [blocks, kv_heads, block_size, head_dim]. A step's work is a table of int32 rows of eight,
made once and read by every layer's launch:

    row 0       prompt tiles, single queries, joins
    joins       token, first partial result, partial results         (`reserved` rows)
    tiles       table row, first token, queries, position of the first, first key, end, partial | -1
    singles     the same, of sequences that add one token

As many programs as the device holds at once share the rows times the KV heads, so that neither the
launch nor its grid depends on the step, and one CUDA graph serves every context. The query heads
that share a KV head are rows of one tile. Flash attention (Dao et al. 2022), in base 2; split keys
after Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
FIELDS = tl.constexpr(8)
JOINED = tl.constexpr(16)  # partial results added at a time


@triton.jit
def write_pages(
    key: tl.tensor,
    value: tl.tensor,
    key_pages: tl.tensor,
    value_pages: tl.tensor,
    slots: tl.tensor,
    key_token: tl.tensor,
    key_head: tl.tensor,
    value_token: tl.tensor,
    value_head: tl.tensor,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a token: all its heads' keys and values go to their place in the pages."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    heads, dims = tl.arange(0, HEADS_PADDED)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (heads < HEADS) & (dims < DIM)
    to = ((slot // BLOCK * HEADS + heads) * BLOCK + slot % BLOCK) * DIM + dims
    new = tl.load(key + token * key_token + heads * key_head + dims, mask=inside)
    tl.store(key_pages + to, to_stored(new, key_pages), mask=inside)
    new = tl.load(value + token * value_token + heads * value_head + dims, mask=inside)
    tl.store(value_pages + to, to_stored(new, value_pages), mask=inside)


@triton.jit
def to_stored(new: tl.tensor, pages: tl.tensor) -> tl.tensor:
    """Keys or values as the pages keep them (`attention.to_stored`)."""
    if pages.dtype.element_ty == tl.float8e4nv:
        most: tl.constexpr = 448.0
        new = tl.minimum(new.to(tl.float32), most, propagate_nan=tl.PropagateNan.ALL)
        new = tl.maximum(new, -most, propagate_nan=tl.PropagateNan.ALL)
    return new.to(pages.dtype.element_ty)


@triton.jit(do_not_specialize=["reserved", "table_stride", "window"])
def attend(
    query: tl.tensor,
    key_pages: tl.tensor,
    value_pages: tl.tensor,
    tables: tl.tensor,
    work: tl.tensor,
    sinks: tl.tensor,
    output: tl.tensor,
    partials: tl.tensor,
    sums: tl.tensor,
    reserved: tl.tensor,
    table_stride: tl.tensor,
    query_token: tl.tensor,
    query_head: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    window: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    SINGLE_ROWS: tl.constexpr,
    SINGLE_KEYS: tl.constexpr,
    SINGLE_STAGES: tl.constexpr,
    MIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    """A share of the step's tiles (none without `MIXED`) and single queries, times the KV heads.

    Scores are `inner` times the products, or under a softcap `outer` times the tanh of that half.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    tiles, singles = tl.load(work), tl.load(work + 1)
    rows = work + (1 + reserved) * FIELDS
    if MIXED:
        for share in range(program, tiles * KV_HEADS, programs):
            _attend(
                query, key_pages, value_pages, tables, rows + share // KV_HEADS * FIELDS, sinks,
                output, partials, sums, share % KV_HEADS, table_stride, query_token, query_head,
                inner, outer, window, KV_HEADS, GROUP, DIM, WIDTH, BLOCK, ROWS, KEYS, STAGES,
                PRECISION, WINDOWED, CAPPED, SINKS,
            )  # fmt: skip
    rows += tiles * FIELDS
    # Go on dealing out where the tiles ended.
    first = (program + programs - tiles * KV_HEADS % programs) % programs
    for share in range(first, singles * KV_HEADS, programs):
        _attend(
            query, key_pages, value_pages, tables, rows + share // KV_HEADS * FIELDS, sinks,
            output, partials, sums, share % KV_HEADS, table_stride, query_token, query_head,
            inner, outer, window, KV_HEADS, GROUP, DIM, WIDTH, BLOCK, SINGLE_ROWS, SINGLE_KEYS,
            SINGLE_STAGES, PRECISION, WINDOWED, CAPPED, SINKS,
        )  # fmt: skip


@triton.jit
def _attend(
    query: tl.tensor, key_pages: tl.tensor, value_pages: tl.tensor, tables: tl.tensor,
    item: tl.tensor, sinks: tl.tensor, output: tl.tensor, partials: tl.tensor, sums: tl.tensor,
    head: tl.tensor, table_stride: tl.tensor, query_token: tl.tensor, query_head: tl.tensor,
    inner: tl.tensor, outer: tl.tensor, window: tl.tensor, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
) -> None:  # fmt: skip
    """One tile: `ROWS // GROUP` neighbouring queries, their heads of one KV head, some keys."""
    table = tables + tl.load(item).to(tl.int64) * table_stride
    partial = tl.load(item + 6)
    row, dims = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    offset, heads = row // GROUP, head * GROUP + row % GROUP
    position = tl.load(item + 3) + offset
    token = tl.load(item + 1).to(tl.int64) + offset
    valid = offset < tl.load(item + 2)
    shown = valid[:, None] & (dims < DIM)[None, :]
    source = query + token * query_token + heads * query_head
    q = tl.load(source[:, None] + dims[None, :], mask=shown, other=0.0)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:  # where there are partial results, joining adds it
        sink = tl.load(sinks + heads, mask=valid, other=0.0) * LOG2_E
        highest = tl.where(partial < 0, sink, highest)
        total = tl.where(partial < 0, 1.0, total)
    sum_of_values = tl.zeros([ROWS, WIDTH], tl.float32)
    end = tl.load(item + 5)
    for start in tl.range(tl.load(item + 4), end, KEYS, num_stages=STAGES):
        keys = start + tl.arange(0, KEYS)
        present = keys < end
        if BLOCK % KEYS == 0:
            block = tl.load(table + start // BLOCK).to(tl.int64)
        else:
            block = tl.load(table + keys // BLOCK, mask=present, other=0).to(tl.int64)
        at = ((block * KV_HEADS + head) * BLOCK + keys % BLOCK) * DIM
        loaded = present[:, None] & (dims < DIM)[None, :]
        k = tl.load(key_pages + at[:, None] + dims[None, :], mask=loaded, other=0.0).to(q.dtype)
        score = _score(q, k, position, keys, end, inner, outer, window, PRECISION, WINDOWED, CAPPED)
        higher = tl.maximum(highest, tl.max(score, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # no key visible yet
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weight, 1)
        v = tl.load(value_pages + at[:, None] + dims[None, :], mask=loaded, other=0.0).to(q.dtype)
        sum_of_values = sum_of_values * shrink[:, None]
        sum_of_values = tl.dot(weight.to(v.dtype), v, sum_of_values, input_precision=PRECISION)
        highest = higher
    if partial < 0:
        row_of = output + (token * (KV_HEADS * GROUP) + heads) * DIM
        result = (sum_of_values / total[:, None]).to(output.dtype.element_ty)
        tl.store(row_of[:, None] + dims[None, :], result, mask=shown)
    else:
        place = partial.to(tl.int64) * (KV_HEADS * GROUP) + heads
        tl.store(
            partials + place[:, None] * WIDTH + dims[None, :], sum_of_values, mask=valid[:, None]
        )
        tl.store(sums + place * 2, highest, mask=valid)
        tl.store(sums + place * 2 + 1, total, mask=valid)


@triton.jit
def _score(
    q: tl.tensor, k: tl.tensor, position: tl.tensor, keys: tl.tensor, end: tl.tensor,
    inner: tl.tensor, outer: tl.tensor, window: tl.tensor, PRECISION: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Scores [ROWS, KEYS] of some keys, in base 2; minus infinity where a query may not look."""
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * inner
    if CAPPED:
        score = outer * (1.0 - 2.0 / (tl.exp2(score) + 1.0))
    visible = (keys < end)[None, :] & (keys[None, :] <= position[:, None])
    if WINDOWED:
        visible &= keys[None, :] > position[:, None] - window
    return tl.where(visible, score, -float("inf"))


@triton.jit
def join(
    partials: tl.tensor,
    sums: tl.tensor,
    work: tl.tensor,
    sinks: tl.tensor,
    output: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    """One program for a head of a join: add up what its splits found, in their order."""
    index, head = tl.program_id(0), tl.program_id(1)
    if index < tl.load(work + 2):
        token = tl.load(work + (1 + index) * FIELDS).to(tl.int64)
        first = tl.load(work + (1 + index) * FIELDS + 1).to(tl.int64)
        count = tl.load(work + (1 + index) * FIELDS + 2)
        dims = tl.arange(0, WIDTH)
        highest, total = -float("inf"), 0.0
        if SINKS:
            highest, total = tl.load(sinks + head) * LOG2_E, 1.0
        result = tl.zeros([WIDTH], tl.float32)
        for start in range(0, count, JOINED):
            split = start + tl.arange(0, JOINED)
            present = split < count
            place = (first + split) * HEADS + head
            peaks = tl.load(sums + place * 2, mask=present, other=-float("inf"))
            part = tl.load(sums + place * 2 + 1, mask=present, other=0.0)
            source = partials + place[:, None] * WIDTH + dims[None, :]
            values = tl.load(source, mask=present[:, None], other=0.0)
            higher = tl.maximum(highest, tl.max(peaks, 0))
            weight, shrink = tl.exp2(peaks - higher), tl.exp2(highest - higher)
            total = total * shrink + tl.sum(weight * part, 0)
            result = result * shrink + tl.sum(weight[:, None] * values, 0)
            highest = higher
        to = output + (token * HEADS + head) * DIM + dims
        tl.store(to, (result / total).to(output.dtype.element_ty), mask=dims < DIM)
