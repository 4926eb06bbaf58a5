"""The Triton kernels of `attention_triton.py`: write keys and values, attend.

Pages are [blocks, kv_heads, block_size, head_dim]. A step's work is a table of int32 rows of eight,
made once and read by every layer's launches, of which one computes tiles, one singles:

    row 0       prompt tiles, splits of single queries
    tiles       table row, first token, queries, position of the first, first key, end
    singles     table row, token, splits of it, position, first key, end, partial result | -1,
                the first partial result of its splits

As many programs as the device holds at once share the rows times the KV heads, so that neither the
launch nor its grid depends on the step, and one CUDA graph serves every context. The query heads
that share a KV head are rows of one tile. Flash attention (Dao et al. 2022), in base 2; split keys
after Flash-Decoding (Dao et al. 2023). Which program is the last of a query's is counted, and that
one adds up what all have found.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
FIELDS = tl.constexpr(8)


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


@triton.jit(do_not_specialize=["table_stride", "window"])
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
    arrived: tl.tensor,
    table_stride: tl.tensor,
    query_token: tl.tensor,
    query_head: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    window: tl.tensor,
    SINGLE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    """A share of the step's prompt tiles, or with `SINGLE` of its singles, times the KV heads.

    Scores are `inner` times the products, or under a softcap `outer` times the tanh of that half.
    `arrived` is zero before and after.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    tiles = tl.load(work)
    if SINGLE:
        rows, shares = work + (1 + tiles) * FIELDS, tl.load(work + 1) * KV_HEADS
    else:
        rows, shares = work + FIELDS, tiles * KV_HEADS
    for turn in range(tl.cdiv(shares, programs)):
        # Back and forth, since the longest come first.
        place = tl.where(turn % 2 == 0, program, programs - 1 - program)
        share = turn * programs + place
        if share < shares:
            _attend(
                query, key_pages, value_pages, tables, rows + share // KV_HEADS * FIELDS, sinks,
                output, partials, sums, arrived, share % KV_HEADS, table_stride, query_token,
                query_head, inner, outer, window, SINGLE, KV_HEADS, GROUP, DIM, WIDTH, BLOCK,
                ROWS, KEYS, STAGES, JOINED, PRECISION, WINDOWED, CAPPED, SINKS,
            )  # fmt: skip


@triton.jit
def _attend(
    query: tl.tensor, key_pages: tl.tensor, value_pages: tl.tensor, tables: tl.tensor,
    item: tl.tensor, sinks: tl.tensor, output: tl.tensor, partials: tl.tensor, sums: tl.tensor,
    arrived: tl.tensor, head: tl.tensor, table_stride: tl.tensor, query_token: tl.tensor,
    query_head: tl.tensor, inner: tl.tensor, outer: tl.tensor, window: tl.tensor,
    SINGLE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, JOINED: tl.constexpr, PRECISION: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, SINKS: tl.constexpr,
) -> None:  # fmt: skip
    """One tile: `ROWS // GROUP` neighbouring queries, their heads of one KV head, some keys."""
    table = tables + tl.load(item).to(tl.int64) * table_stride
    first_token = tl.load(item + 1).to(tl.int64)
    count = tl.load(item + 2)
    first_position = tl.load(item + 3)
    end = tl.load(item + 5)
    row, dims = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    offset, heads = row // GROUP, head * GROUP + row % GROUP
    token, position = first_token + offset, first_position + offset
    partial = tl.cast(-1, tl.int32)
    valid = offset < count
    if SINGLE:
        partial = tl.load(item + 6)
        valid = row < GROUP
    shown = valid[:, None] & (dims < DIM)[None, :]
    source = query + token * query_token + heads * query_head
    q = tl.load(source[:, None] + dims[None, :], mask=shown, other=0.0)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:  # where there are partial results, joining adds it
        sink = tl.load(sinks + heads, mask=valid, other=0.0) * LOG2_E
        highest = tl.where(partial < 0, sink, highest)
        total = tl.where(partial < 0, 1.0, total)
    highest, total, sum_of_values = _fold(
        q, key_pages, value_pages, table, head, position, first_position, tl.load(item + 4), end,
        highest, total, inner, outer, window, SINGLE, KV_HEADS, GROUP, DIM, WIDTH, BLOCK, ROWS,
        KEYS, STAGES, PRECISION, WINDOWED, CAPPED,
    )  # fmt: skip
    if partial < 0:
        row_of = output + (token * (KV_HEADS * GROUP) + heads) * DIM
        result = (sum_of_values / total[:, None]).to(output.dtype.element_ty)
        tl.store(row_of[:, None] + dims[None, :], result, mask=shown)
    elif SINGLE:
        place = partial.to(tl.int64) * (KV_HEADS * GROUP) + heads
        tl.store(
            partials + place[:, None] * WIDTH + dims[None, :], sum_of_values, mask=valid[:, None]
        )
        tl.store(sums + place * 2, highest, mask=valid)
        tl.store(sums + place * 2 + 1, total, mask=valid)
        tl.debug_barrier()  # what all threads have stored comes before what one counts
        first = tl.load(item + 7)
        counter = arrived + first * KV_HEADS + head
        if tl.atomic_add(counter, 1, sem="acq_rel") == count - 1:
            tl.store(counter, 0)
            _join(
                partials, sums, sinks, output, first_token, head, first, count, KV_HEADS, GROUP,
                DIM, WIDTH, JOINED, SINKS,
            )  # fmt: skip


@triton.jit
def _fold(
    q: tl.tensor, key_pages: tl.tensor, value_pages: tl.tensor, table: tl.tensor, head: tl.tensor,
    position: tl.tensor, first_position: tl.tensor, first: tl.tensor, end: tl.tensor,
    highest: tl.tensor, total: tl.tensor, inner: tl.tensor, outer: tl.tensor, window: tl.tensor,
    SINGLE: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The highest score, the sum of weights and that of weighted values, with the keys of a tile.

    Scores are in base 2.
    """
    sum_of_values = tl.zeros([ROWS, WIDTH], tl.float32)
    dims = tl.arange(0, WIDTH)
    factor = outer if CAPPED else inner
    for start in tl.range(first, end, KEYS, num_stages=STAGES):
        keys = start + tl.arange(0, KEYS)
        at = _places(table, start, end, head, KV_HEADS, DIM, BLOCK, KEYS)
        loaded = (keys < end)[:, None] & (dims < DIM)[None, :]
        k = tl.load(key_pages + at[:, None] + dims[None, :], mask=loaded, other=0.0).to(q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CAPPED:
            score = 1.0 - 2.0 / (tl.exp2(score * inner) + 1.0)
        # Most tiles have no key that a query may not see.
        hides = start + KEYS > (end if SINGLE else first_position + 1)
        if WINDOWED:
            hides |= start <= first_position + ROWS // GROUP - 1 - window
        if hides:
            if SINGLE:
                visible = (keys < end)[None, :]
            else:
                visible = keys[None, :] <= position[:, None]
            if WINDOWED:
                visible &= keys[None, :] > position[:, None] - window
            score = tl.where(visible, score, -float("inf"))
        higher = tl.maximum(highest, tl.max(score, 1) * factor)
        base = higher
        if WINDOWED:
            base = tl.where(higher == -float("inf"), 0.0, higher)  # no key visible yet
        weight = tl.exp2(tl.fma(score, factor, -base[:, None]))
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weight, 1)
        v = tl.load(value_pages + at[:, None] + dims[None, :], mask=loaded, other=0.0).to(q.dtype)
        sum_of_values = sum_of_values * shrink[:, None]
        sum_of_values = tl.dot(weight.to(v.dtype), v, sum_of_values, input_precision=PRECISION)
        highest = higher
    return highest, total, sum_of_values


@triton.jit
def _places(
    table: tl.tensor, start: tl.tensor, end: tl.tensor, head: tl.tensor, KV_HEADS: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Where in the pages the keys from `start` are; anywhere from `end` on."""
    key = tl.arange(0, KEYS)
    size: tl.constexpr = BLOCK * DIM
    if BLOCK % KEYS == 0:
        place = _block_at(table, start, end, head, KV_HEADS, BLOCK, size)
        return place + (start % BLOCK + key) * DIM
    if KEYS % BLOCK == 0 and KEYS <= 4 * BLOCK:
        found = tl.zeros([KEYS], tl.int64)
        for part in tl.static_range(KEYS // BLOCK):
            place = _block_at(table, start + part * BLOCK, end, head, KV_HEADS, BLOCK, size)
            found = tl.where(key // BLOCK == part, place, found)
        return found + key % BLOCK * DIM
    block = tl.load(table + (start + key) // BLOCK, mask=start + key < end, other=0).to(tl.int64)
    return (block * KV_HEADS + head) * size + (start + key) % BLOCK * DIM


@triton.jit
def _block_at(
    table: tl.tensor, key: tl.tensor, end: tl.tensor, head: tl.tensor, KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr, SIZE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Where the block of a key begins. A branch, and no mask, hides the load from Triton's
    pipeline, which would make a stage of it and take that from the keys and values."""
    block = tl.cast(0, tl.int64)
    if key < end:
        block = tl.load(table + key // BLOCK).to(tl.int64)
    return (block * KV_HEADS + head) * SIZE


@triton.jit
def _join(
    partials: tl.tensor, sums: tl.tensor, sinks: tl.tensor, output: tl.tensor, token: tl.tensor,
    head: tl.tensor, first: tl.tensor, count: tl.tensor, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, JOINED: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:  # fmt: skip
    """Add up what a query's splits found, in their order. Others wrote it: L1 may not know."""
    PADDED: tl.constexpr = triton.next_power_of_2(GROUP)
    member, dims = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    heads, inside = head * GROUP + member, member < GROUP
    highest = tl.full([PADDED], -float("inf"), tl.float32)
    total = tl.zeros([PADDED], tl.float32)
    if SINKS:
        highest = tl.load(sinks + heads, mask=inside, other=0.0) * LOG2_E
        total += 1.0
    result = tl.zeros([PADDED, WIDTH], tl.float32)
    for start in range(0, count, JOINED):
        split = start + tl.arange(0, JOINED)
        present = (split < count)[:, None] & inside[None, :]
        place = (first + split).to(tl.int64)[:, None] * (KV_HEADS * GROUP) + heads[None, :]
        source = partials + place[:, :, None] * WIDTH + dims[None, None, :]
        values = tl.load(source, mask=present[:, :, None], other=0.0, cache_modifier=".cg")
        peaks = tl.load(sums + place * 2, mask=present, other=-float("inf"), cache_modifier=".cg")
        part = tl.load(sums + place * 2 + 1, mask=present, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(highest, tl.max(peaks, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # of rows that are not there
        weight, shrink = tl.exp2(peaks - base[None, :]), tl.exp2(highest - base)
        total = total * shrink + tl.sum(weight * part, 0)
        result = result * shrink[:, None] + tl.sum(weight[:, :, None] * values, 0)
        highest = higher
    to = output + (token * (KV_HEADS * GROUP) + heads)[:, None] * DIM + dims[None, :]
    shown = inside[:, None] & (dims < DIM)[None, :]
    tl.store(to, (result / total[:, None]).to(output.dtype.element_ty), mask=shown)
