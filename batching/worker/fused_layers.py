"""Llama-shaped layers on GPUs: nine launches in place of some fifty.

At one sequence a step the GPU mostly starts small kernels. Here queries, keys and values come from
one product, gate and up from one; residuals are added by the products themselves (in plain
weights); normalising, rotating with the writing of pages, and activating are a kernel each
(`fused_kernels.py`), or, with few rows, parts of the products (`few_rows.py`). The layers take the
place of transformers' own inside its model, so everything around them, the probe included, stays as
it is.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import triton
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from batching.worker import llama_shape
from batching.worker.attention_triton import TritonAttention, padded
from batching.worker.few_rows import is_for, multiply
from batching.worker.fused_kernels import activate, normalize, rotate_and_write
from batching.worker.model import PagedLayer

PIECE = 1024  # of a row's activations, that a program computes
ROTATED = 512  # pairs of a query's numbers to a warp


class FusedNorm(nn.Module):
    """RMSNorm in one launch."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, float(norm.variance_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output, width = torch.empty_like(x), x.shape[-1]
        taken = padded(width)
        normalize[(x.numel() // width,)](
            x, self.weight, output, self.epsilon, WIDTH=width, PADDED=taken,
            num_warps=max(1, min(16, taken // 512)),
        )  # fmt: skip
        return output


class FusedLayer(nn.Module):
    """Computes what a layer of `llama_shape.LAYERS` does, and takes its weights."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _merge(*(self.attention._modules.pop(f"{name}_proj") for name in "qkv"))
        self.output = self.attention._modules.pop("o_proj")
        self.gate_up = _merge(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj
        self.input_norm = FusedNorm(layer.input_layernorm)
        self.post_norm = FusedNorm(layer.post_attention_layernorm)
        self.head_dim = self.attention.head_dim
        self.group = self.attention.num_key_value_groups
        self.kv_heads = self.qkv.out_features // self.head_dim // (self.group + 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: Any,
    ) -> torch.Tensor:
        """Changes `hidden_states` [sequences, tokens, width], which nobody else needs, in place."""
        x = hidden_states.view(-1, hidden_states.shape[-1])
        qkv = _normed_product(x, self.input_norm, self.qkv)
        shape = hidden_states.shape[:2]
        cos, sin = (part.expand(*shape, -1).flatten(0, 1) for part in position_embeddings)
        paged: PagedLayer | None = getattr(self.attention, "paged_layer", None)
        if paged is not None and isinstance(paged.backend, TritonAttention):
            self._rotate(qkv, cos, sin, paged)
            query = qkv.view(len(qkv), -1, self.head_dim)[:, : self.group * self.kv_heads]
            attended = paged.backend.attend(query, paged.pages, paged.spec, paged.step.metadata)
        else:
            self._rotate(qkv, cos, sin, None)
            attended = self._attend(qkv.view(*shape, -1), attention_mask)
        _add_product(x, self.output, attended.view(len(x), -1))
        _add_product(x, self.down, self._activated(x))
        return hidden_states

    def _rotate(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, paged: PagedLayer | None
    ) -> None:
        """Normalise and rotate queries and keys; with pages, write keys and values there."""
        norms = [getattr(self.attention, f"{name}_norm", None) for name in "qk"]
        query_norm, key_norm = (None if norm is None else norm.weight for norm in norms)
        pages: tuple[Any, Any] = (None, None)
        slots, block_size = None, 1
        if paged is not None:
            metadata = paged.step.metadata
            pages, slots, block_size = paged.pages, metadata.slot_mapping, metadata.block_size
        half, queries = self.head_dim // 2, self.group * self.kv_heads
        rotate_and_write[(len(qkv),)](
            qkv, cos, sin, query_norm, key_norm, *pages, slots,
            0.0 if norms[0] is None else float(norms[0].variance_epsilon),
            KV_HEADS=self.kv_heads, QUERIES=queries, QUERIES_PADDED=padded(queries, 1),
            KEYS_PADDED=padded(self.kv_heads, 1), HALF=half, HALF_PADDED=padded(half),
            BLOCK=block_size, NORMED=query_norm is not None, PAGED=paged is not None,
            num_warps=min(16, max(1, padded(queries, 1) * padded(half) // ROTATED)),
        )  # fmt: skip

    def _attend(self, qkv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """By whatever attention the model is set to: the probe, or a backend of other pages."""
        heads = qkv.view(*qkv.shape[:2], -1, self.head_dim).transpose(1, 2)
        sizes = [self.group * self.kv_heads, self.kv_heads, self.kv_heads]
        attention = ALL_ATTENTION_FUNCTIONS[self.attention.config._attn_implementation]
        scale = self.attention.scaling
        attended, _ = attention(self.attention, *heads.split(sizes, 1), mask, scaling=scale)
        return attended.contiguous()

    def _activated(self, x: torch.Tensor) -> torch.Tensor:
        if is_for(x, self.gate_up, normed=True):
            return multiply(x, self.gate_up, self.post_norm, paired=True)
        gate_up = self.gate_up(self.post_norm(x))
        rows, width = len(gate_up), gate_up.shape[1] // 2
        output = gate_up.new_empty(rows, width)
        activate[rows, triton.cdiv(width, PIECE)](gate_up, output, WIDTH=width, PIECE=PIECE)
        return output


def _merge(*linears: nn.Linear) -> nn.Linear:
    """One layer with the outputs of all."""
    first, outputs = linears[0], sum(linear.out_features for linear in linears)
    merged = nn.Linear(first.in_features, outputs, first.bias is not None, device="meta")
    for name, _ in list(merged.named_parameters()):
        whole = _joined([getattr(linear, name).detach() for linear in linears])
        setattr(merged, name, nn.Parameter(whole, requires_grad=False))
        for linear in linears:
            setattr(linear, name, None)
    return merged


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """All rows in one tensor: a copy, unless they lie side by side already (`read_ahead.py`)."""
    first, rows = parts[0], sum(map(len, parts))
    if all(
        left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        and left.data_ptr() + left.nbytes == right.data_ptr()
        for left, right in pairwise(parts)
    ):
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    return torch.cat(parts)


def _normed_product(x: torch.Tensor, norm: FusedNorm, linear: nn.Module) -> torch.Tensor:
    """`linear(norm(x))`, in one launch where the rows are few and the weights plain."""
    if is_for(x, linear, normed=True):
        return multiply(x, linear, norm)
    product: torch.Tensor = linear(norm(x))
    return product


def _add_product(x: torch.Tensor, linear: nn.Module, rows: torch.Tensor) -> None:
    """Add `linear(rows)` to `x`, in one launch where the weights are plain."""
    if is_for(rows, linear):
        multiply(rows, linear, added_to=x)
    elif type(linear) is nn.Linear and linear.bias is None:
        x.addmm_(rows, linear.weight.t())
    else:
        x.add_(linear(rows))


def fuse(model: Any) -> bool:
    """Replace a model's layers and last norm, while it computes on the host.

    Returns whether that is done.
    """
    base = model.base_model
    if llama_shape.refuses(model) is not None:
        return False
    cos, _ = base.rotary_emb(torch.empty(1), torch.zeros(1, 1, dtype=torch.int64))
    if cos.shape[-1] != base.layers[0].self_attn.head_dim:  # a part of each head is not rotated
        return False
    for index, layer in enumerate(base.layers):
        base.layers[index] = FusedLayer(layer)
    base.norm = FusedNorm(base.norm)
    model.has_plain_head = True  # as all of that shape
    return True
