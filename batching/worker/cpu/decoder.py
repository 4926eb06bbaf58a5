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
from torch import nn

from batching.worker import llama_shape
from batching.worker.attention import AttentionMetadata, LayerSpec
from batching.worker.cpu.attention import LANES, CpuAttention
from batching.worker.cpu.linear import PANEL, CLinear, PackedLinear
from batching.worker.cpu.memory import huge

ROW_BLOCK, FEW = 256, 32  # as in linear.h and decoder.h
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
        *_pointers("tokens", "positions", "plans"),
        *((name, _Matrix) for name in ("residual", "normed", "qkv", "attended", "activated")),
        ("bytes", _Matrix),
        *_pointers("scales"),
    )


class _Room:
    """Memory for the activations of so many tokens, and `fields`, which tell C++ where it is."""

    def __init__(self, tokens: int, rows: int, widths: _Widths, dtype: torch.dtype) -> None:
        """`rows` is a block's."""
        self.tokens = tokens
        self.normed = _spread(tokens, widths.hidden, dtype)
        self._scales = torch.empty(rows)
        self._matrices = (
            _spread(tokens, widths.hidden, torch.float32),
            self.normed,
            _spread(tokens, widths.qkv, dtype),
            _spread(tokens, widths.attended, dtype),
            _spread(rows, widths.activated, dtype),
            _spread(rows, widths.bytes, torch.uint8),
        )
        matrices = (_Matrix(matrix.data_ptr(), matrix.stride(0)) for matrix in self._matrices)
        self.fields = (*matrices, self._scales.data_ptr())


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


def refuses(model: Any) -> str | None:
    """Why a model that transformers loaded cannot be computed here, or None."""
    shape = llama_shape.refuses(model)
    if shape is not None:
        return shape
    config, attention = model.config, model.base_model.layers[0].self_attn
    cos, _ = _rotary(model, 1)
    head_dim = attention.head_dim
    for name, width, multiple in (
        ("hidden size", config.hidden_size, PANEL),
        ("intermediate size", config.intermediate_size, LANES),
        ("query, key and value width", sum(map(len, _qkv(attention))), PANEL),
        ("query width", attention.o_proj.in_features, LANES),
        ("head size", head_dim, LANES),
        ("rotary width", cos.shape[1] * 2, 2 * LANES),
    ):
        if width % multiple:
            return f"its {name}, {width}, is no multiple of {multiple}"
    return None


class CpuDecoder:
    """Implements `model.Runner`, and empties the transformers model as it packs its weights.

    `model` must pass `refuses`. Memory peaks at one layer, or the head, above the weights.
    """

    def __init__(
        self,
        model: Any,
        specs: list[LayerSpec],
        backend: CpuAttention,
        pages: list[tuple[torch.Tensor, torch.Tensor]],
        max_model_len: int,
        *,
        int8: bool = False,
    ) -> None:
        self._backend = backend
        self._specs, self._library, self._int8 = specs, backend.library, int8
        self._pages = pages
        self._dtype, self._is_bfloat16 = model.dtype, model.dtype == torch.bfloat16
        self._vocabulary = model.config.vocab_size
        self._kept: list[Any] = []  # whatever C++ holds pointers to
        base = model.base_model
        self._layers = (_Layer * len(base.layers))()
        for target, layer, spec, kv in zip(self._layers, base.layers, specs, pages, strict=True):
            self._fill(target, layer, kv)
            target.attention = backend.layer_address(spec)
        embedding = base.embed_tokens.weight
        # Embeddings are read from the packed head where that is exact.
        shared = model.lm_head.weight is embedding and not int8
        self._head = self._pack(model.lm_head.weight)
        cos, sin = _rotary(model, max_model_len)
        self._decoder = _Decoder(
            ctypes.addressof(self._layers),
            None if shared else self._keep(embedding.data),
            ctypes.addressof(self._head) if shared else None,
            self._keep(base.norm.weight.float()),
            self._keep(cos),
            self._keep(sin),
            base.norm.variance_epsilon,
            len(base.layers),
            model.config.hidden_size,
            model.config.intermediate_size,
            2 * cos.shape[1],
        )
        _empty(model)
        # Kept between steps, as large as ever needed: fresh memory costs more than filling it.
        self._room = self._allocate(0)
        self._logits = huge((LOGITS_KEPT, self._head.columns), torch.float32)

    @property
    def weight_bytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept)

    def padding(self, tokens: int, sequences: int) -> int:
        return 0

    def hidden(
        self, tokens: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        schedule, count = self._backend.prepare(metadata, self._specs), len(tokens)
        if count > self._room.tokens:
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
        return _Room(max(tokens, rows), rows, widths, self._dtype)

    def _fill(self, target: _Layer, layer: Any, pages: tuple[torch.Tensor, torch.Tensor]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = None
        if attention.q_proj.bias is not None:
            bias = torch.cat([projection.bias for projection in projections])
        target.qkv = self._pack(torch.cat(_qkv(attention)), bias)
        target.output = self._pack(attention.o_proj.weight)
        target.gate_up = self._pack(interleave(mlp.gate_proj.weight, mlp.up_proj.weight))
        target.down = self._pack(mlp.down_proj.weight)
        target.input_norm = self._keep(layer.input_layernorm.weight.float())
        target.post_norm = self._keep(layer.post_attention_layernorm.weight.float())
        if hasattr(attention, "q_norm"):
            target.query_norm = self._keep(attention.q_norm.weight.float())
            target.key_norm = self._keep(attention.k_norm.weight.float())
        target.key_pages, target.value_pages = (page.data_ptr() for page in pages)
        _empty(layer)

    def _pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> CLinear:
        packed = PackedLinear(weight, bias, int8=self._int8)
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


def _qkv(attention: Any) -> tuple[torch.Tensor, ...]:
    return attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight


def _rotary(model: Any, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines float32 [positions, rotary / 2], as the model computes them."""
    embedding = model.base_model.rotary_emb
    cos, sin = embedding(torch.empty(1), torch.arange(positions)[None])
    half = cos.shape[-1] // 2  # the second half repeats the first
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _empty(module: nn.Module) -> None:
    """Drop the parameters' memory; what is still needed of it has another owner."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
