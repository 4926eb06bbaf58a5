"""Paged attention on GPUs in Triton: all sequences of a step, of whatever length, in one launch.

Promise: what a query gets depends on its own sequence only, not on the batch. Keys are folded in
tiles that start at fixed positions; the keys of a sequence that adds one token are cut into splits
at fixed positions, too, which a second launch joins in order.

`prepare` divides the work on the host, once a step for each kind of layer, and sends all of it to
the device in one copy; nothing waits for the device. How much there is the kernels read from there,
so a captured launch serves whatever step fits its buffers (`cuda_graphs.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from batching.worker.attention import AttentionMetadata, LayerSpec
from batching.worker.attention_kernels import attend, join, write_pages
from batching.worker.attention_work import Division, divide, most_splits
from batching.worker.device import compute_units, float32_products, has_fp8, shared_memory, upload

SPLIT_TOKENS = 512
ROOM_BYTES = 256 << 20  # for partial results; splits are longer where it would not suffice
LOG2_E = 1.4426950408889634
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD = 256
PLENTY = 160 << 10  # bytes of a unit's shared memory that `TILES` wants


@dataclass(frozen=True)
class Tiles:
    """How one size of head is computed.

    A prompt tile has `rows` rows (queries times heads of a group) and folds `keys` keys at a time,
    with `stages` in Triton's pipeline; single queries have their own. `programs` and
    `single_programs` run on a compute unit at once, in steps with and without prompts.
    """

    rows: int
    keys: int
    stages: int
    single_keys: int
    single_stages: int
    warps: int
    programs: int
    single_programs: int


# By padded head size, for 16-bit numbers. Chosen by what the compiler reports for sm_90: nothing is
# spilled, and a unit holds as many programs as are launched. Not yet measured on a GPU.
TILES = {
    64: Tiles(64, 64, 5, 128, 5, warps=4, programs=2, single_programs=2),
    128: Tiles(64, 64, 5, 64, 5, warps=4, programs=2, single_programs=2),
    256: Tiles(64, 32, 3, 32, 5, warps=8, programs=1, single_programs=2),
}
# For the 64 KiB of shared memory that every GPU has.
SMALL_TILES = {
    64: Tiles(64, 32, 3, 64, 3, warps=4, programs=2, single_programs=2),
    128: Tiles(64, 32, 3, 32, 3, warps=4, programs=1, single_programs=2),
    256: Tiles(32, 16, 2, 16, 3, warps=4, programs=1, single_programs=1),
}
FLOAT32_TILES = {
    64: Tiles(32, 32, 3, 32, 3, warps=4, programs=1, single_programs=2),
    128: Tiles(16, 16, 3, 32, 3, warps=4, programs=1, single_programs=2),
    256: Tiles(16, 16, 1, 16, 1, warps=8, programs=1, single_programs=1),
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
    """What layers of one kind do in a step: the kernels' table int32 [n, FIELDS], and the launch.

    `reserved` rows of it are for joins. `mixed` says whether prompt tiles are looked for,
    `programs` how many programs share the rest.
    """

    table: torch.Tensor
    reserved: int
    mixed: bool
    programs: int


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
        self._split = SPLIT_TOKENS
        self._room = torch.empty(0, device=device)

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
        while each * most_splits(max_context, self._split) * 4 > ROOM_BYTES:
            self._split *= 2
        self._room = self._room.new_empty(each * most_splits(max_context, self._split))

    def divide(
        self, metadata: AttentionMetadata, specs: Iterable[LayerSpec]
    ) -> dict[Kind, Division]:
        """The step's work for each kind of layer."""
        kinds = {kind_of(spec): spec for spec in specs}
        return {kind: self._divide(metadata, spec) for kind, spec in kinds.items()}

    def touch_when_idle(self, pages: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """A device's memory is there when it has been allocated."""

    def prepare(self, metadata: AttentionMetadata, specs: list[LayerSpec]) -> Schedule:
        divisions = self.divide(metadata, specs)
        tables = [division.table(len(division.joins)) for division in divisions.values()]
        sent = upload(np.concatenate(tables), torch.int32, self._device).split(
            [len(t) for t in tables]
        )
        schedule = {}
        for (kind, division), table in zip(divisions.items(), sent, strict=True):
            pieces = (len(division.tiles) + len(division.singles)) * kind[1]
            mixed = len(division.tiles) > 0
            programs = min(pieces, self.programs(kind, mixed=mixed))
            schedule[kind] = Work(table, len(division.joins), mixed, programs)
        return schedule

    def most_splits(self, max_context: int) -> int:
        """The most pieces that one sequence's keys are cut into."""
        return most_splits(max_context, self._split)

    def programs(self, kind: Kind, *, mixed: bool) -> int:
        """How many programs the device runs at once."""
        tiles = self._tiles[kind[2]]
        return self._units * (tiles.programs if mixed else tiles.single_programs)

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
        width = padded(spec.head_dim)
        partials, sums = self._partial_results(spec)
        self._fold(query, pages, output, partials, sums, spec, metadata, work)
        if work.reserved:
            join[work.reserved, spec.heads](
                partials, sums, work.table, spec.sinks, output,
                HEADS=spec.heads, DIM=spec.head_dim, WIDTH=width, SINKS=spec.sinks is not None,
                num_warps=1 if width <= 128 else 2,
            )  # fmt: skip
        return output

    def _divide(self, metadata: AttentionMetadata, spec: LayerSpec) -> Division:
        tiles = self._tiles[spec.head_dim]
        rows, group = _rows_of(spec, tiles), spec.heads // spec.kv_heads
        keys = max(tiles.keys, tiles.single_keys)
        return divide(
            metadata.counts, metadata.contexts, rows // group, keys, self._split, spec.window
        )

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
        partials: torch.Tensor,
        sums: torch.Tensor,
        spec: LayerSpec,
        metadata: AttentionMetadata,
        work: Work,
    ) -> None:
        tiles = self._tiles[spec.head_dim]
        inner, outer = spec.scale * LOG2_E, 0.0
        if spec.softcap is not None:
            inner, outer = 2 * inner / spec.softcap, spec.softcap * LOG2_E
        attend[(work.programs,)](
            query, *pages, metadata.block_tables, work.table, spec.sinks, output, partials, sums,
            work.reserved, metadata.block_tables.stride(0), query.stride(0), query.stride(1),
            inner, outer, spec.window or 0,
            **constants(spec, tiles, metadata.block_size), MIXED=work.mixed,
            PRECISION=self._precision, num_warps=tiles.warps,
        )  # fmt: skip


def constants(spec: LayerSpec, tiles: Tiles, block_size: int) -> dict[str, Any]:
    """What `attend` is compiled for, besides `MIXED` and `PRECISION`."""
    return {
        "KV_HEADS": spec.kv_heads,
        "GROUP": spec.heads // spec.kv_heads,
        "DIM": spec.head_dim,
        "WIDTH": padded(spec.head_dim),
        "BLOCK": block_size,
        "ROWS": _rows_of(spec, tiles),
        "KEYS": tiles.keys,
        "STAGES": tiles.stages,
        "SINGLE_ROWS": padded(spec.heads // spec.kv_heads),
        "SINGLE_KEYS": tiles.single_keys,
        "SINGLE_STAGES": tiles.single_stages,
        "WINDOWED": spec.window is not None,
        "CAPPED": spec.softcap is not None,
        "SINKS": spec.sinks is not None,
    }


def _rows_of(spec: LayerSpec, tiles: Tiles) -> int:
    """Rows of a prompt tile: at least a group of heads."""
    return max(tiles.rows, padded(spec.heads // spec.kv_heads))


def _partial_floats(spec: LayerSpec) -> int:
    """Numbers in one partial result: values, highest score and sum of weights of each head."""
    return spec.heads * (padded(spec.head_dim) + 2)
