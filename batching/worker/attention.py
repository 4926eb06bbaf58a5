"""Paged attention: one metadata type, one protocol, one table of backends.

A step runs all its sequences packed: queries of shape [tokens, heads, head_dim], no padding. Each
layer writes the step's keys and values into its pages, then every query attends to its own
sequence's pages, causally.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from batching.worker.protocol import UnsupportedModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerSpec:
    """What one attention layer computes. Constant after loading."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None  # a query sees this many newest keys, itself included
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks: torch.Tensor | None = None  # float32 [heads]: one more logit, with no value, per softmax


@dataclass
class AttentionMetadata:
    """One step's geometry, built once and shared by all layers. Sequences in plan order.

    `query_start` int32 [sequences + 1]: offsets into the packed tokens.
    `context` int32 [sequences]: keys visible to the sequence's last query, this step's included.
    `block_tables` int32 [sequences, max_blocks]: entries beyond the context are undefined.
    `slot_mapping` int64 [tokens]: block * block_size + offset, where each token's key goes.
    `counts`, `contexts`: each sequence's queries and context, on the host.
    `schedule`: what the backend's `prepare` returned, for instance its division of the work. One
    that was made before (`triton_slots.py`) says itself which rows of `block_tables` to read, and
    there is no `query_start` and `context`.
    """

    query_start: torch.Tensor
    context: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    block_size: int
    counts: list[int]
    contexts: list[int]
    schedule: Any = None


class AttentionBackend(Protocol):
    """One way to compute paged attention on one kind of device.

    `dtype` is that of queries, keys and values; pages have another if the backend was built so.
    """

    name: str

    def refuses(self, spec: LayerSpec, dtype: torch.dtype) -> str | None:
        """Why this layer cannot be computed exactly, or None. Asked once per layer at load."""

    def page_bytes(self, spec: LayerSpec, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block's keys and values of one layer."""

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value pages of one layer, in whatever layout the backend reads fastest."""

    def reserve(self, specs: list[LayerSpec], sequences: int, max_context: int) -> None:
        """Take what memory a step needs for that many sequences of that length. Called once."""

    def touch_when_idle(self, pages: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Have the system provide the memory of `pages`, without holding up anything else."""

    def prepare(self, metadata: AttentionMetadata, specs: list[LayerSpec]) -> Any:
        """Work that depends on the step but not on the layer; stored in `metadata.schedule`."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: tuple[torch.Tensor, torch.Tensor],
        spec: LayerSpec,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Write `key`, `value` [tokens, kv_heads, head_dim] to the pages, then attend.

        `query` [tokens, heads, head_dim]; inputs may be strided views with a contiguous last
        dimension. Returns [tokens, heads, head_dim] in the query's dtype.
        """


# Backends by name, as "module:class", built as class(device, stored=KV_DTYPES[…]), which raises
# ImportError or OSError where it cannot be. "auto" takes the first of the device's list that
# refuses no layer.
BACKENDS = {
    "cpu": "batching.worker.cpu.attention:CpuAttention",
    "reference": "batching.worker.attention_reference:ReferenceAttention",
    "triton": "batching.worker.attention_triton:TritonAttention",
}
PREFERRED = {"cpu": ("cpu", "reference")}
ACCELERATED = ("triton", "reference")
# How pages keep keys and values, None as they come. Floating point as e4m3 is as exact for small
# numbers as for large ones, so there is no scale; what is beyond its largest becomes that.
KV_DTYPES = {"auto": None, "fp8": torch.float8_e4m3fn}


def choose_backend(
    name: str,
    device: torch.device,
    specs: list[LayerSpec],
    dtype: torch.dtype,
    stored: torch.dtype | None = None,
) -> AttentionBackend:
    """The backend of that name, or for "auto" the fastest that can serve all layers.

    Logs why a faster one was passed over. Raises `UnsupportedModelError` with every candidate's
    reason if none can serve.
    """
    names = PREFERRED.get(device.type, ACCELERATED) if name == "auto" else (name,)
    reasons = []
    for candidate in names:
        try:
            backend = _build(candidate, device, stored)
        except (ImportError, OSError, KeyError) as error:
            reasons.append(f"{candidate}: {error}")
            continue
        refusals = {backend.refuses(spec, dtype) for spec in specs} - {None}
        if not refusals:
            if reasons:
                logger.warning("attention backend %s; not %s", candidate, "; not ".join(reasons))
            return backend
        reasons.append(f"{candidate}: {', '.join(sorted(map(str, refusals)))}")
    raise UnsupportedModelError("no attention backend can serve the model: " + "; ".join(reasons))


def _build(name: str, device: torch.device, stored: torch.dtype | None) -> AttentionBackend:
    module, _, cls = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), cls)(device, stored=stored)


def to_stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values as pages of that dtype keep them."""
    if dtype not in KV_DTYPES.values():
        return values
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype)
