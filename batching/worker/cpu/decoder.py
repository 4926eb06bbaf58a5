"""Llama-shaped models on CPU in C++: a whole forward pass in one parallel region.

What it buys over the transformers forward: weights packed for the CPU's dot products and read once,
merged query-key-value and gate-up products, normalisation, rotary embedding and activation fused
into what is beside them, and two hundred entries into OpenMP turned into one.

Promise, with `attention.py`'s: a token's hidden state and logits have the same bits in whatever
batch it rides and however its prompt was cut into chunks, in float32, bfloat16 and int8, with any
number of threads. Every product accumulates in one fixed order, whatever the number of rows.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch

from batching.worker.attention import AttentionMetadata, LayerSpec
from batching.worker.cpu.attention import LANES, CpuAttention
from batching.worker.cpu.linear import PANEL, CLinear, PackedLinear
from batching.worker.cpu.memory import huge
from batching.worker.llama_shape import LayerWeights, LlamaWeights, Shape

ROW_BLOCK, FEW, TILE_HEIGHT = 256, 32, 16  # as in product.h, decoder.h and amx.h
MAX_HEAD_DIM = 512  # as in decoder.h
CACHE_LINE = 64  # bytes
LOGITS_KEPT = 64  # rows of logits whose memory is kept between steps

QUANTIZATIONS = ("none", "int8")


def _pointers(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, ctypes.c_void_p) for name in names)


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, CLinear) for name in ("qkv", "output", "gate_up", "down")),
        *_pointers("input_norm", "post_norm", "query_norm", "key_norm"),
        *_pointers("attention", "key_pages", "value_pages"),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        *_pointers("layers", "embedding", "tied", "final_norm", "cos", "sin"),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("count", "hidden", "intermediate", "rotary")),
    )


class _Matrix(ctypes.Structure):
    _fields_ = (*_pointers("data"), ("stride", ctypes.c_int64))


class _Pass(ctypes.Structure):
    _fields_ = (
        *_pointers("tokens", "positions", "plans", "residual", "qkv", "activated"),
        *((name, _Matrix) for name in ("normed", "attended", "bytes")),
        *_pointers("scales"),
    )


class _Room:
    """Memory for the activations of so many tokens, and `fields`, which tell C++ where it is."""

    def __init__(self, tokens: int, rows: int, widths: _Widths, dtype: torch.dtype) -> None:
        """`rows` is a block's."""
        self.tokens, self.rows = tokens, rows
        self.normed = _spread(tokens, widths.hidden, dtype)
        self._packed = (
            _strips(tokens, widths.hidden, torch.float32),
            _strips(tokens, widths.qkv, dtype),
            _strips(rows, widths.activated, dtype),
            torch.empty(rows),
        )
        self._matrices = (
            self.normed,
            _spread(tokens, widths.attended, dtype),
            _spread(rows, widths.bytes, torch.uint8),
        )
        *strips, scales = (packed.data_ptr() for packed in self._packed)
        matrices = (_Matrix(matrix.data_ptr(), matrix.stride(0)) for matrix in self._matrices)
        self.fields = (*strips, *matrices, scales)


class _Widths(NamedTuple):
    hidden: int
    qkv: int
    attended: int
    activated: int
    bytes: int  # 0: weights are not int8


def _spread(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, width], whose rows are an odd number of cache lines apart (`Matrix` of decoder.h)."""
    line = CACHE_LINE // dtype.itemsize
    stride = (-(-width // line) | 1) * line
    return torch.empty(rows, stride, dtype=dtype)[:, :width]


def _strips(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Room for strips or heads of so many rows, and up to a tile more each; or of fewer rows."""
    line = CACHE_LINE // dtype.itemsize
    return torch.empty(-(-width // line) * line * (rows + TILE_HEIGHT), dtype=dtype)


def refuses(shape: Shape) -> str | None:
    """Why a model of Llama's shape cannot be computed here, or None."""
    queries = shape.heads * shape.head_dim
    for name, width, multiple in (
        ("hidden size", shape.hidden, PANEL),
        ("intermediate size", shape.intermediate, LANES),
        ("query, key and value width", queries + 2 * shape.kv_heads * shape.head_dim, PANEL),
        ("query width", queries, LANES),
        ("head size", shape.head_dim, LANES),
        ("rotary width", shape.rotary, 2 * LANES),
    ):
        if width % multiple:
            return f"its {name}, {width}, is no multiple of {multiple}"
    if shape.head_dim > MAX_HEAD_DIM:
        return f"its head size, {shape.head_dim}, is above {MAX_HEAD_DIM}"
    return None


class CpuDecoder:
    """Implements `runner.Runner`; packs the weights layer by layer, so that none is there twice.

    `refuses` must not refuse the model's shape. `dtype`, float32 or bfloat16, is that of
    activations, keys and values, whatever that of the weights.
    """

    def __init__(
        self,
        weights: LlamaWeights,
        specs: list[LayerSpec],
        backend: CpuAttention,
        pages: list[tuple[torch.Tensor, torch.Tensor]],
        dtype: torch.dtype,
        *,
        int8: bool = False,
    ) -> None:
        self._backend = backend
        self._specs, self._library, self._int8 = specs, backend.library, int8
        self._pages = pages
        embedding = weights.embedding
        self._dtype, self._is_bfloat16 = dtype, dtype == torch.bfloat16
        self._vocabulary = weights.vocab_size
        self._kept: list[Any] = []  # whatever C++ holds pointers to
        self._layers = (_Layer * weights.count)()
        for target, layer, spec, kv in zip(self._layers, weights.layers, specs, pages, strict=True):
            self._fill(target, layer, kv)
            target.attention = backend.layer_address(spec)
        # Embeddings are read from the packed head where that is exact.
        shared = weights.head is embedding and not int8
        self._head = self._pack(weights.head)
        self._decoder = _Decoder(
            ctypes.addressof(self._layers),
            None if shared else self._keep(embedding.data.to(dtype)),
            ctypes.addressof(self._head) if shared else None,
            self._keep(_own(weights.final_norm)),
            self._keep(weights.cos),
            self._keep(weights.sin),
            weights.epsilon,
            weights.count,
            embedding.shape[1],
            weights.intermediate,
            2 * weights.cos.shape[1],
        )
        # Kept between steps, as large as ever needed: fresh memory costs more than filling it.
        self._room = self._allocate(0)
        self._logits = huge((LOGITS_KEPT, self._head.columns), torch.float32)

    @property
    def weight_bytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept)

    def hidden(
        self, tokens: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        schedule, count = self._backend.prepare(metadata, self._specs), len(tokens)
        if count > self._room.tokens or FEW * torch.get_num_threads() > self._room.rows:
            self._room = self._allocate(count)
        plans = (ctypes.c_void_p * len(self._specs))(*map(schedule.plan, self._specs))
        work = _Pass(
            tokens.data_ptr(),
            positions.data_ptr(),
            ctypes.addressof(plans),
            *self._room.fields,
        )
        self._library.slipstream_decode(
            ctypes.byref(self._decoder),
            ctypes.byref(work),
            ctypes.c_void_p(schedule.address),
            self._is_bfloat16,
        )
        return self._room.normed[:count]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.contiguous()
        output = self._logits[: len(hidden)]
        if len(hidden) > LOGITS_KEPT:
            output = torch.empty(len(hidden), self._head.columns)
        self._library.slipstream_project(
            ctypes.byref(self._head),
            ctypes.c_void_p(hidden.data_ptr()),
            len(hidden),
            ctypes.c_void_p(output.data_ptr()),
            torch.get_num_threads(),
            self._is_bfloat16,
        )
        return output[:, : self._vocabulary]

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits(hidden)

    def largest(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.contiguous()
        output = torch.empty(len(hidden), dtype=torch.int64)
        self._library.slipstream_project_largest(
            ctypes.byref(self._head),
            ctypes.c_void_p(hidden.data_ptr()),
            len(hidden),
            self._vocabulary,
            ctypes.c_void_p(output.data_ptr()),
            torch.get_num_threads(),
            self._is_bfloat16,
        )
        return output

    def _allocate(self, tokens: int) -> _Room:
        layer, hidden = self._layers[0], self._decoder.hidden
        attended, activated = layer.output.rows, self._decoder.intermediate
        widest = max(hidden, attended, activated) if self._int8 else 0
        widths = _Widths(hidden, layer.qkv.columns, attended, activated, widest)
        rows = max(ROW_BLOCK, FEW * torch.get_num_threads())
        return _Room(-(-max(tokens, rows) // TILE_HEIGHT) * TILE_HEIGHT, rows, widths, self._dtype)

    def _fill(
        self, target: _Layer, layer: LayerWeights, pages: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        bias = None if layer.biases is None else torch.cat(layer.biases)
        target.qkv = self._pack(torch.cat(layer.qkv), bias)
        target.output = self._pack(layer.output)
        target.gate_up = self._pack(interleave(layer.gate, layer.up))
        target.down = self._pack(layer.down)
        target.input_norm = self._keep(_own(layer.input_norm))
        target.post_norm = self._keep(_own(layer.post_norm))
        if layer.query_norm is not None and layer.key_norm is not None:
            target.query_norm = self._keep(_own(layer.query_norm))
            target.key_norm = self._keep(_own(layer.key_norm))
        target.key_pages, target.value_pages = (page.data_ptr() for page in pages)

    def _pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> CLinear:
        packed = PackedLinear(weight, bias, int8=self._int8, dtype=self._dtype)
        self._kept.append(packed)
        return packed.struct

    def _keep(self, tensor: torch.Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Sixteen rows of one, sixteen of the other: a panel then holds both operands of a product."""
    rows = gate.shape[1]
    return torch.stack([gate.view(-1, LANES, rows), up.view(-1, LANES, rows)], 1).view(-1, rows)


def _own(norm: torch.Tensor) -> torch.Tensor:
    """A copy in float32."""
    return norm.detach().to(torch.float32, copy=True)
