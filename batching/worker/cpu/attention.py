"""Paged attention on CPU in C++: pages are read in place, one query tile at a time.

Promise: on one machine a token's output has the same bits in whatever batch it rides, whether it is
computed alone or inside a prompt chunk, with any number of threads. A row's keys are folded in
chunks of 128 and splits of 512 that start at fixed positions of its own sequence; the division of
the work between threads and tiles only regroups rows and splits. (Flash attention's online softmax,
Dao et al. 2022; split-KV after Flash-Decoding, Dao et al. 2023.)

Layout, head-major, so that a query tile streams contiguous pages. With p = 2 elements to a 32-bit
unit for bfloat16 and p = 1 for float32:
  keys   [blocks, kv_heads, block_size / 16, head_dim / p, 16, p]: a vector has 16 keys
  values [blocks, kv_heads, head_dim / 16, block_size / p, 16, p]: pairs of tokens interleaved
which is what the bfloat16 dot-product and AMX tile instructions take as their second operand,
unchanged and each in one piece. Keys of blocks of other sizes: [.., head_dim / p, block_size, p].
Value rows are as long as whole vectors: a head size of 72 takes 80. Tiles want blocks and heads of
multiples of 32; blocks of other sizes are computed with vectors, to other bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

import torch

from batching.worker.attention import AttentionMetadata, LayerSpec
from batching.worker.cpu.build import NATIVE, load_library
from batching.worker.cpu.memory import huge

SOURCE = Path(__file__).with_name("kernels.cpp")
PER_UNIT = {torch.float32: 1, torch.bfloat16: 2}
LANES = 16


def _columns(spec: LayerSpec) -> int:
    return -(-spec.head_dim // LANES) * LANES


class _Step(ctypes.Structure):
    _fields_ = (
        ("query_start", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("sequences", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("sinks", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("window", ctypes.c_int32),
    )


class _KnownLayer:
    """A layer's constants as C reads them. Holds the spec, so that its id stays taken."""

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self.geometry = (spec.heads, spec.kv_heads, spec.head_dim, spec.window)
        self._sinks = None if spec.sinks is None else spec.sinks.detach().float().contiguous()
        self._struct = _Layer(
            None if self._sinks is None else self._sinks.data_ptr(),
            spec.scale,
            spec.softcap or 0.0,
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            spec.window or 0,
        )
        self.address = ctypes.addressof(self._struct)


class _Span(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class _Touching:
    """A thread that touches tensors' memory; ends, at the latest, with this object."""

    def __init__(self, library: ctypes.CDLL, tensors: list[torch.Tensor]) -> None:
        self._library, self._tensors = library, tensors
        spans = (_Span * len(tensors))(*(_Span(t.data_ptr(), t.nbytes) for t in tensors))
        self._thread = library.slipstream_touch(spans, len(tensors))

    def __del__(self) -> None:
        self._library.slipstream_stop_touching(self._thread)


class _Schedule:
    """One step's work, divided once for each kind of layer. Owns the C++ plans."""

    def __init__(
        self, library: ctypes.CDLL, metadata: AttentionMetadata, layers: Iterable[_KnownLayer]
    ) -> None:
        self._library = library
        self._tensors = (
            metadata.query_start,
            metadata.context,
            metadata.block_tables,
            metadata.slot_mapping,
        )
        self._struct = _Step(
            *(tensor.data_ptr() for tensor in self._tensors),
            metadata.block_tables.stride(0),
            metadata.context.shape[0],
            metadata.slot_mapping.shape[0],
            metadata.block_size,
            torch.get_num_threads(),
        )
        self.address = ctypes.addressof(self._struct)
        self.plans: dict[tuple[int, int, int, int | None], int] = {}
        for layer in layers:
            if layer.geometry not in self.plans:
                plan = library.slipstream_plan(self.address, layer.address)
                self.plans[layer.geometry] = plan

    def plan(self, spec: LayerSpec) -> int:
        """The C++ plan of one layer's kind."""
        return self.plans[spec.heads, spec.kv_heads, spec.head_dim, spec.window]

    def __del__(self) -> None:
        for plan in self.plans.values():
            self._library.slipstream_free(plan)


class CpuAttention:
    """Implements `attention.AttentionBackend` for float32 and bfloat16.

    Raises OSError if the library is not built yet and cannot be: no compiler, no writable cache.
    """

    name = "cpu"

    def __init__(
        self,
        device: torch.device,
        cache: Path | None = None,
        target: tuple[str, ...] = NATIVE,
        stored: torch.dtype | None = None,
    ) -> None:
        if stored is not None:
            raise OSError(f"keeps no keys and values in {stored}".replace("torch.", ""))
        if device.type != "cpu":
            raise OSError(f"computes on the CPU, not on {device.type}")
        self.library = load_library(SOURCE, cache, target)
        self.library.slipstream_plan.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self.library.slipstream_plan.restype = ctypes.c_void_p
        self.library.slipstream_free.argtypes = (ctypes.c_void_p,)
        self.library.slipstream_free.restype = None
        self.library.slipstream_touch.argtypes = (ctypes.c_void_p, ctypes.c_int32)
        self.library.slipstream_touch.restype = ctypes.c_void_p
        self.library.slipstream_stop_touching.argtypes = (ctypes.c_void_p,)
        self.library.slipstream_stop_touching.restype = None
        self._attend = self.library.slipstream_attend
        self._attend.argtypes = (
            *[ctypes.c_void_p] * 9,
            *[ctypes.c_int64] * 6,
            ctypes.c_int32,
        )
        self._attend.restype = None
        self._layers: dict[int, _KnownLayer] = {}

    def refuses(self, spec: LayerSpec, dtype: torch.dtype) -> str | None:
        if dtype not in PER_UNIT:
            return f"dtype {dtype}".replace("torch.", "")
        if spec.head_dim % PER_UNIT[dtype]:
            return f"odd head size {spec.head_dim} with {dtype}".replace("torch.", "")
        if spec.heads % spec.kv_heads:
            return f"{spec.heads} heads do not divide into {spec.kv_heads} groups"
        return None

    def page_bytes(self, spec: LayerSpec, block_size: int, dtype: torch.dtype) -> int:
        dims = spec.head_dim + _columns(spec)
        return block_size * spec.kv_heads * dims * dtype.itemsize

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        per = PER_UNIT[dtype]
        if block_size % per:
            raise ValueError(f"a block of {block_size} {dtype} tokens does not divide into pairs")
        head = (num_blocks, spec.kv_heads)
        keys = LANES if block_size % LANES == 0 else block_size  # of a vector
        return (
            huge((*head, block_size // keys, spec.head_dim // per, keys, per), dtype),
            huge((*head, _columns(spec) // LANES, block_size // per, LANES, per), dtype),
        )

    def reserve(self, specs: list[LayerSpec], sequences: int, max_context: int) -> None:
        """Every step takes what it needs."""

    def touch_when_idle(self, pages: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._touching = _Touching(self.library, [tensor for pair in pages for tensor in pair])

    def prepare(self, metadata: AttentionMetadata, specs: list[LayerSpec]) -> _Schedule:
        """Reads the metadata now and again in each `forward`: do not change it in between."""
        for tensor, dtype in (
            (metadata.query_start, torch.int32),
            (metadata.context, torch.int32),
            (metadata.block_tables[0], torch.int32),
            (metadata.slot_mapping, torch.int64),
        ):
            if tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(f"metadata must be contiguous {dtype}")
        return _Schedule(self.library, metadata, map(self._known, specs))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: tuple[torch.Tensor, torch.Tensor],
        spec: LayerSpec,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        layer, schedule = self._known(spec), metadata.schedule
        output = torch.empty(query.shape, dtype=query.dtype)
        query_token, query_head, query_last = query.stride()
        key_token, key_head, key_last = key.stride()
        value_token, value_head, value_last = value.stride()
        if not query_last == key_last == value_last == 1:
            raise ValueError("the last dimension of query, key and value must be contiguous")
        self._attend(
            schedule.address,
            layer.address,
            schedule.plans[layer.geometry],
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            pages[0].data_ptr(),
            pages[1].data_ptr(),
            output.data_ptr(),
            query_token,
            query_head,
            key_token,
            key_head,
            value_token,
            value_head,
            query.dtype == torch.bfloat16,
        )
        return output

    def layer_address(self, spec: LayerSpec) -> int:
        """The layer's constants as C reads them; valid as long as this object."""
        return self._known(spec).address

    def _known(self, spec: LayerSpec) -> _KnownLayer:
        layer = self._layers.get(id(spec))
        if layer is None:
            layer = self._layers[id(spec)] = _KnownLayer(spec)
        return layer
