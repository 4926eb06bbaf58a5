"""Paged attention on GPUs in Triton: all sequences of a step, of whatever length, in one launch.

Promise: what a query gets depends on its own sequence only, not on the batch. Keys are folded in
tiles that start at fixed positions; the keys of a sequence that adds one token are cut into splits
at positions that depend on its length only, and what they give is added up in their order.

`prepare` divides the work on the host, once a step for each kind of layer, and sends all of it to
the device in one copy; nothing waits for the device. How much there is the kernels read from there,
so a captured launch serves whatever step fits its buffers (`cuda_graphs.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from batching.worker.attention import AttentionMetadata, LayerSpec
from batching.worker.attention_kernels import attend, write_pages
from batching.worker.attention_work import Division, divide
from batching.worker.device import compute_units, float32_products, has_fp8, shared_memory, upload

SPLIT_TOKENS = 256  # the least that a split has
MOST_SPLITS = 32  # of a sequence: longer ones have longer splits
ROOM_BYTES = 256 << 20  # for partial results; there are fewer splits where it would not suffice
# Of single queries, there are up to so many programs for each that runs at once: those that come
# later balance the load. Recordings expect SPLITS of a sequence, as idle programs cost, too.
WAVES = 6
SPLITS = 4
LOG2_E = 1.4426950408889634
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD = 256
PLENTY = 160 << 10  # bytes of a unit's shared memory that `TILES` wants


@dataclass(frozen=True)
class Tile:
    """How a program computes: `rows` rows (queries times heads of a group) by `keys` keys at a
    time, with `stages` in Triton's pipeline and so many warps. A compute unit holds `programs`."""

    rows: int
    keys: int
    stages: int
    warps: int
    programs: int


@dataclass(frozen=True)
class Tiles:
    """How one size of head is computed: prompts, and queries of sequences that add one token."""

    prompt: Tile
    single: Tile


# By padded head size, for 16-bit numbers. 128 is the best of a dozen on an H200; the others follow
# it, with what the compiler reports for sm_90: nothing is spilled, and as many programs fit.
TILES = {
    64: Tiles(Tile(64, 64, 3, 4, 2), Tile(16, 64, 3, 2, 5)),
    128: Tiles(Tile(64, 64, 3, 4, 2), Tile(16, 32, 3, 2, 5)),
    256: Tiles(Tile(64, 32, 3, 8, 1), Tile(16, 32, 3, 4, 2)),
}
# For the 64 KiB of shared memory that every GPU has.
SMALL_TILES = {
    64: Tiles(Tile(64, 32, 3, 4, 2), Tile(16, 64, 3, 4, 2)),
    128: Tiles(Tile(64, 32, 3, 4, 1), Tile(16, 32, 3, 4, 2)),
    256: Tiles(Tile(32, 16, 2, 4, 1), Tile(16, 16, 3, 4, 1)),
}
FLOAT32_TILES = {
    64: Tiles(Tile(32, 32, 3, 4, 1), Tile(16, 32, 3, 4, 2)),
    128: Tiles(Tile(16, 16, 3, 4, 1), Tile(16, 32, 2, 4, 1)),
    256: Tiles(Tile(16, 16, 1, 8, 1), Tile(16, 16, 1, 8, 1)),
}


def choose_tiles(head_dim: int, dtype: torch.dtype, shared: int) -> Tiles:
    """The table's entry for a head size and dtype, given a unit's bytes of shared memory."""
    table = TILES if shared >= PLENTY else SMALL_TILES
    if dtype == torch.float32:
        table = FLOAT32_TILES
    return next(tiles for width, tiles in table.items() if head_dim <= width)


def padded(count: int, least: int = 16) -> int:
    """The next power of two: sizes that Triton takes."""
    return max(least, 1 << (count - 1).bit_length())


@dataclass
class Work:
    """What layers of one kind do in a step: the kernels' table int32 [n, FIELDS], and how many
    programs share its prompt tiles and its single queries."""

    table: torch.Tensor
    prompt_programs: int
    single_programs: int


Kind = tuple[int, int, int, int | None]  # heads, KV heads, head size, window
Schedule = dict[Kind, Work]


def kind_of(spec: LayerSpec) -> Kind:
    """All that the division of a layer's work depends on."""
    return spec.heads, spec.kv_heads, spec.head_dim, spec.window


class TritonAttention:
    """Implements `attention.AttentionBackend`. On the CPU only where Triton interprets (tests)."""

    name = "triton"

    def __init__(self, device: torch.device, stored: torch.dtype | None = None) -> None:
        if device.type == "cpu" and not triton.knobs.runtime.interpret:
            raise OSError("computes on GPUs only")
        if stored is not None and not has_fp8(device):
            raise OSError(f"keeps no keys and values in {stored} on this GPU".replace("torch.", ""))
        self._device, self._stored = device, stored
        self._units, self._shared = compute_units(device), shared_memory(device)
        self._tiles: dict[int, Tiles] = {}  # by head size
        self._precision = float32_products(device)
        self._most_splits = MOST_SPLITS
        self._room = torch.empty(0, device=device)
        self._arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def refuses(self, spec: LayerSpec, dtype: torch.dtype) -> str | None:
        if dtype not in DTYPES:
            return f"dtype {dtype}".replace("torch.", "")
        if spec.head_dim > LARGEST_HEAD:
            return f"head size {spec.head_dim}, more than {LARGEST_HEAD}"
        if spec.heads % spec.kv_heads:
            return f"{spec.heads} heads do not divide into {spec.kv_heads} groups"
        return None

    def page_bytes(self, spec: LayerSpec, block_size: int, dtype: torch.dtype) -> int:
        return 2 * block_size * spec.kv_heads * spec.head_dim * (self._stored or dtype).itemsize

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._tiles[spec.head_dim] = choose_tiles(spec.head_dim, dtype, self._shared)
        shape = (num_blocks, spec.kv_heads, block_size, spec.head_dim)
        return (
            torch.empty(shape, dtype=self._stored or dtype, device=self._device),
            torch.empty(shape, dtype=self._stored or dtype, device=self._device),
        )

    def reserve(self, specs: list[LayerSpec], sequences: int, max_context: int) -> None:
        """Make room for the partial results of that many sequences of that length."""
        each = sequences * max(map(_partial_floats, specs))
        while each * self.most_splits(max_context) * 4 > ROOM_BYTES:
            self._most_splits //= 2
        partials = sequences * self.most_splits(max_context)
        self._room = self._room.new_empty(partials * max(map(_partial_floats, specs)))
        self._arrived = self._arrived.new_zeros(partials * max(spec.kv_heads for spec in specs))

    def divide(
        self,
        counts: Sequence[int] | np.ndarray,
        contexts: Sequence[int] | np.ndarray,
        specs: Iterable[LayerSpec],
        table_rows: np.ndarray | None = None,
    ) -> dict[Kind, Division]:
        """A step's work for each kind of layer (`attention_work.divide`)."""
        kinds = {kind_of(spec): spec for spec in specs}
        return {
            kind: self._divide(counts, contexts, spec, table_rows) for kind, spec in kinds.items()
        }

    def touch_when_idle(self, pages: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """A device's memory is there when it has been allocated."""

    def prepare(self, metadata: AttentionMetadata, specs: list[LayerSpec]) -> Schedule:
        divisions = self.divide(metadata.counts, metadata.contexts, specs)
        tables = [division.table() for division in divisions.values()]
        sent = upload(np.concatenate(tables), torch.int32, self._device).split(
            [len(t) for t in tables]
        )
        return {
            kind: self.work_of(kind, division, table)
            for (kind, division), table in zip(divisions.items(), sent, strict=True)
        }

    def most_splits(self, max_context: int) -> int:
        """The most pieces that one sequence's keys are cut into."""
        return min(self._most_splits, -(-max_context // SPLIT_TOKENS))

    def work(self, kind: Kind, table: torch.Tensor, tokens: int, *, mixed: bool) -> Work:
        """For any step of so many tokens, with or without prompts."""
        prompt, single = self._at_once(kind)
        expected = tokens * kind[1] * SPLITS
        return Work(table, prompt if mixed else 0, min(max(single, expected), single * WAVES))

    def work_of(self, kind: Kind, division: Division, table: torch.Tensor) -> Work:
        """For one step, whose table is on the device."""
        prompt, single = self._at_once(kind)
        return Work(
            table,
            min(len(division.tiles) * kind[1], prompt),
            min(len(division.singles) * kind[1], single * WAVES),
        )

    def _at_once(self, kind: Kind) -> tuple[int, int]:
        """How many programs the device runs at once, of prompts and of single queries."""
        tiles = self._tiles[kind[2]]
        return self._units * tiles.prompt.programs, self._units * tiles.single.programs

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: tuple[torch.Tensor, torch.Tensor],
        spec: LayerSpec,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        if not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
            raise ValueError("the last dimension of query, key and value must be contiguous")
        self._write(key, value, pages, spec, metadata)
        return self.attend(query, pages, spec, metadata)

    def attend(
        self,
        query: torch.Tensor,
        pages: tuple[torch.Tensor, torch.Tensor],
        spec: LayerSpec,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """As `forward`, when keys and values have been written."""
        work: Work = metadata.schedule[kind_of(spec)]
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if work.prompt_programs:
            self._fold(query, pages, output, spec, metadata, work, single=False)
        if work.single_programs:
            self._fold(query, pages, output, spec, metadata, work, single=True)
        return output

    def _divide(
        self,
        counts: Sequence[int] | np.ndarray,
        contexts: Sequence[int] | np.ndarray,
        spec: LayerSpec,
        table_rows: np.ndarray | None,
    ) -> Division:
        tiles = self._tiles[spec.head_dim]
        group = spec.heads // spec.kv_heads
        return divide(
            counts, contexts, table_rows,
            queries=_rows_of(spec, tiles.prompt) // group,
            keys=max(tiles.prompt.keys, tiles.single.keys),
            split=SPLIT_TOKENS, most=self._most_splits, window=spec.window,
        )  # fmt: skip

    def _partial_results(self, spec: LayerSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and sums of every partial result, in the room that all layers use in turn."""
        count = len(self._room) // _partial_floats(spec)
        sums = count * spec.heads * 2
        return self._room[sums:], self._room[:sums]

    def _write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: tuple[torch.Tensor, torch.Tensor],
        spec: LayerSpec,
        metadata: AttentionMetadata,
    ) -> None:
        write_pages[(len(key),)](
            key, value, *pages, metadata.slot_mapping,
            key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            HEADS=spec.kv_heads, HEADS_PADDED=padded(spec.kv_heads, 1), DIM=spec.head_dim,
            WIDTH=padded(spec.head_dim), BLOCK=metadata.block_size,
        )  # fmt: skip

    def _fold(
        self,
        query: torch.Tensor,
        pages: tuple[torch.Tensor, torch.Tensor],
        output: torch.Tensor,
        spec: LayerSpec,
        metadata: AttentionMetadata,
        work: Work,
        *,
        single: bool,
    ) -> None:
        tiles = self._tiles[spec.head_dim]
        tile = tiles.single if single else tiles.prompt
        programs = work.single_programs if single else work.prompt_programs
        inner, outer = spec.scale * LOG2_E, 0.0
        if spec.softcap is not None:
            inner, outer = 2 * inner / spec.softcap, spec.softcap * LOG2_E
        attend[(programs,)](
            query, *pages, metadata.block_tables, work.table, spec.sinks, output,
            *self._partial_results(spec), self._arrived,
            metadata.block_tables.stride(0), query.stride(0), query.stride(1),
            inner, outer, spec.window or 0,
            **constants(spec, tile, metadata.block_size), SINGLE=single,
            PRECISION=self._precision, num_warps=tile.warps,
        )  # fmt: skip


def constants(spec: LayerSpec, tile: Tile, block_size: int) -> dict[str, Any]:
    """What `attend` is compiled for, besides `SINGLE` and `PRECISION`."""
    joined = 1024 * tile.warps // (padded(spec.heads // spec.kv_heads, 1) * padded(spec.head_dim))
    return {
        "KV_HEADS": spec.kv_heads,
        "GROUP": spec.heads // spec.kv_heads,
        "DIM": spec.head_dim,
        "WIDTH": padded(spec.head_dim),
        "BLOCK": block_size,
        "ROWS": _rows_of(spec, tile),
        "KEYS": tile.keys,
        "STAGES": tile.stages,
        "JOINED": max(1, min(16, joined)),  # so that a thread holds 32 numbers of them
        "WINDOWED": spec.window is not None,
        "CAPPED": spec.softcap is not None,
        "SINKS": spec.sinks is not None,
    }


def _rows_of(spec: LayerSpec, tile: Tile) -> int:
    """Rows of a tile: at least a group of heads."""
    return max(tile.rows, padded(spec.heads // spec.kv_heads))


def _partial_floats(spec: LayerSpec) -> int:
    """Numbers in one partial result: values, highest score and sum of weights of each head."""
    return spec.heads * (padded(spec.head_dim) + 2)
