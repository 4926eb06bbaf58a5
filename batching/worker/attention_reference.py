"""Attention in plain torch: the meaning that every other backend must reproduce, on any device.

Each sequence's keys are gathered from their pages and attended to in float32, a bounded number of
queries at a time. Page layout: [blocks, block_size, kv_heads, head_dim].
"""

from __future__ import annotations

from itertools import accumulate

import torch

from batching.worker.attention import AttentionMetadata, LayerSpec, to_stored

SCORE_ELEMENTS = 1 << 24  # bounds the float32 score matrix to 64 MiB


class ReferenceAttention:
    """Implements `attention.AttentionBackend`. Serves every `LayerSpec` and dtype."""

    name = "reference"

    def __init__(self, device: torch.device, stored: torch.dtype | None = None) -> None:
        self._device, self._stored = device, stored

    def refuses(self, spec: LayerSpec, dtype: torch.dtype) -> str | None:
        return None

    def page_bytes(self, spec: LayerSpec, block_size: int, dtype: torch.dtype) -> int:
        return 2 * block_size * spec.kv_heads * spec.head_dim * (self._stored or dtype).itemsize

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (num_blocks, block_size, spec.kv_heads, spec.head_dim)
        return (
            torch.empty(shape, dtype=self._stored or dtype, device=self._device),
            torch.empty(shape, dtype=self._stored or dtype, device=self._device),
        )

    def reserve(self, specs: list[LayerSpec], sequences: int, max_context: int) -> None:
        """Every step takes what it needs."""

    def touch_when_idle(self, pages: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """The pages are not expected to be used for long."""

    def prepare(
        self, metadata: AttentionMetadata, specs: list[LayerSpec]
    ) -> list[tuple[int, int, int]]:
        """Per sequence: first packed query, query count, context."""
        first = accumulate(metadata.counts, initial=0)
        return list(zip(first, metadata.counts, metadata.contexts, strict=False))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: tuple[torch.Tensor, torch.Tensor],
        spec: LayerSpec,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        for page, new in zip(pages, (key, value), strict=True):
            new = to_stored(new, page.dtype)
            if self._stored is not None:  # torch copies its bytes only
                page, new = page.view(torch.uint8), new.view(torch.uint8)
            page.flatten(0, 1).index_copy_(0, metadata.slot_mapping, new)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for i, (first, count, context) in enumerate(metadata.schedule):
            step = max(1, SCORE_ELEMENTS // (spec.heads * context))
            for offset in range(0, count, step):
                rows = slice(first + offset, first + min(offset + step, count))
                position = context - count + offset
                output[rows] = _attend(
                    query[rows], position, metadata.block_tables[i], pages, spec
                ).to(query.dtype)
        return output


def _attend(
    query: torch.Tensor,
    position: int,
    table: torch.Tensor,
    pages: tuple[torch.Tensor, torch.Tensor],
    spec: LayerSpec,
) -> torch.Tensor:
    """Attend with queries [n, heads, head_dim] at positions position … position+n-1, in float32."""
    count, block_size = len(query), pages[0].shape[1]
    end = position + count
    first = 0 if spec.window is None else max(0, position + 1 - spec.window)
    first_block = first // block_size
    blocks = table[first_block : -(-end // block_size)].long()
    start = first_block * block_size
    keys, values = (
        page[blocks].flatten(0, 1)[: end - start].movedim(0, 1).float() for page in pages
    )
    grouped = query.float().view(count, spec.kv_heads, -1, spec.head_dim).permute(1, 2, 0, 3)
    scores = torch.einsum("kgnd,kcd->kgnc", grouped, keys) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    distance = (
        torch.arange(position, end, device=query.device)[:, None]
        - torch.arange(start, end, device=query.device)[None]
    )
    hidden = distance < 0
    if spec.window is not None:
        hidden |= distance >= spec.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if spec.sinks is not None:
        sinks = spec.sinks.view(spec.kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    attended = torch.einsum("kgnc,kcd->kgnd", weights, values)
    return attended.permute(2, 0, 1, 3).reshape(count, spec.heads, spec.head_dim)
