"""Paged attention inputs with known answers, for the tests of backends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from batching.worker.attention import AttentionBackend, AttentionMetadata, LayerSpec, to_stored
from batching.worker.attention_triton import TritonAttention

CPU = torch.device("cpu")
UNDEFINED = 2**30  # a block that does not exist: reading it would crash


@dataclass
class Case:
    """Sequences as (context, queries): the last `queries` of `context` tokens are computed."""

    spec: LayerSpec
    sequences: list[tuple[int, int]]
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    seed: int = 0
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if self.spec.sinks is not None:
            self.spec = replace(self.spec, sinks=self.spec.sinks.to(self.device))
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int, tokens: int) -> torch.Tensor:
            shape = (tokens, heads, self.spec.head_dim)
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        spec = self.spec
        self.query = [draw(spec.heads, context) for context, _ in self.sequences]
        self.key = [draw(spec.kv_heads, context) for context, _ in self.sequences]
        self.value = [draw(spec.kv_heads, context) for context, _ in self.sequences]
        blocks = [-(-context // self.block_size) for context, _ in self.sequences]
        self.num_blocks = sum(blocks) + 1
        order = torch.randperm(self.num_blocks, generator=generator).to(torch.int32)
        self.tables = torch.full((len(blocks), max(blocks) + 1), UNDEFINED, dtype=torch.int32)
        for row, part in zip(self.tables, order[: sum(blocks)].split(blocks), strict=True):
            row[: len(part)] = part

    def pages(self, backend: AttentionBackend) -> tuple[torch.Tensor, torch.Tensor]:
        """Fresh pages full of NaN: whatever is read before it is written shows."""
        pages = backend.allocate(self.spec, self.num_blocks, self.block_size, self.dtype)
        longest = max(context for context, _ in self.sequences)
        backend.reserve([self.spec], len(self.sequences), longest)
        for page in pages:
            page.fill_(torch.nan)
        return pages

    def step(
        self,
        backend: AttentionBackend,
        pages: tuple[torch.Tensor, torch.Tensor],
        ranges: list[tuple[int, int, int]],
    ) -> list[torch.Tensor]:
        """One packed step over ranges of (sequence, first token, end); the outputs of each."""
        metadata = self.metadata(ranges)
        metadata.schedule = backend.prepare(metadata, [self.spec])
        parts = [
            torch.cat([data[s][first:end] for s, first, end in ranges])
            for data in (self.query, self.key, self.value)
        ]
        output = backend.forward(*parts, pages, self.spec, metadata)
        return list(output.split([end - first for _, first, end in ranges]))

    def metadata(self, ranges: list[tuple[int, int, int]]) -> AttentionMetadata:
        counts = torch.tensor([0] + [end - first for _, first, end in ranges])
        contexts = [end for _, _, end in ranges]
        slots = []
        for s, first, end in ranges:
            position = torch.arange(first, end)
            block = self.tables[s, position // self.block_size].long()
            slots.append(block * self.block_size + position % self.block_size)
        return AttentionMetadata(
            query_start=counts.cumsum(0).to(self.device, torch.int32),
            context=torch.tensor(contexts, dtype=torch.int32, device=self.device),
            block_tables=self.tables[[s for s, _, _ in ranges]].to(self.device),
            slot_mapping=torch.cat(slots).to(self.device),
            block_size=self.block_size,
            counts=[end - first for _, first, end in ranges],
            contexts=contexts,
        )

    def one_by_one(self, backend: AttentionBackend) -> Iterator[torch.Tensor]:
        """As `run`, with each sequence in steps of its own: what came before, then its queries."""
        pages = self.pages(backend)
        for s, (context, queries) in enumerate(self.sequences):
            if context > queries:
                self._write(backend, pages, [(s, 0, context - queries)])
            yield self.step(backend, pages, [(s, context - queries, context)])[0]

    def run(self, backend: AttentionBackend) -> list[torch.Tensor]:
        """Outputs of the queried tokens; whatever precedes them is written in an earlier step."""
        pages = self.pages(backend)
        earlier = [(s, 0, context - n) for s, (context, n) in enumerate(self.sequences)]
        self._write(backend, pages, [span for span in earlier if span[2] > 0])
        return self.step(backend, pages, [(s, c - n, c) for s, (c, n) in enumerate(self.sequences)])

    def _write(
        self,
        backend: AttentionBackend,
        pages: tuple[torch.Tensor, torch.Tensor],
        ranges: list[tuple[int, int, int]],
    ) -> None:
        """Keys and values of an earlier step, whose outputs nobody looks at. For Triton without a
        kernel: interpreted, it would take most of a test's time."""
        if not isinstance(backend, TritonAttention):
            if ranges:
                self.step(backend, pages, ranges)
            return
        for s, first, end in ranges:
            slots = self.metadata([(s, first, end)]).slot_mapping
            where = slots // self.block_size, slice(None), slots % self.block_size
            for page, data in zip(pages, (self.key[s], self.value[s]), strict=True):
                page[where] = to_stored(data[first:end], page.dtype)

    def expected(self) -> list[torch.Tensor]:
        """The same in float64, over dense matrices, as the definition has it."""
        return [self._expected(s, context - n) for s, (context, n) in enumerate(self.sequences)]

    def _expected(self, sequence: int, first: int) -> torch.Tensor:
        spec, group = self.spec, self.spec.heads // self.spec.kv_heads
        query = self.query[sequence][first:].cpu().double()
        key = self.key[sequence].cpu().double().repeat_interleave(group, 1)
        value = self.value[sequence].cpu().double().repeat_interleave(group, 1)
        score = torch.einsum("qhd,khd->hqk", query, key) * spec.scale
        if spec.softcap is not None:
            score = spec.softcap * torch.tanh(score / spec.softcap)
        ahead = torch.arange(key.shape[0]) - torch.arange(first, key.shape[0])[:, None]
        hidden = ahead > 0
        if spec.window is not None:
            hidden |= ahead <= -spec.window
        score = score.masked_fill(hidden, -torch.inf)
        if spec.sinks is not None:
            sink = spec.sinks.cpu().double()[:, None, None].expand(-1, score.shape[1], 1)
            score = torch.cat([score, sink], -1)
        weight = score.softmax(-1)[..., : key.shape[0]]
        return torch.einsum("hqk,khd->qhd", weight, value)


def spec_of(heads: int, kv_heads: int, head_dim: int, **rest: object) -> LayerSpec:
    return replace(LayerSpec(heads, kv_heads, head_dim, head_dim**-0.5), **rest)  # type: ignore[arg-type]
