"""CPU attention, one layer: microseconds, share of memory bandwidth, and gather + SDPA beside it.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python -m tests.bench.bench_attention [--rounds N]

All candidates take turns within each round and medians are reported, because machines are shared.
Every decode case cycles through enough page sets that none is still in a cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from batching.worker.attention import AttentionMetadata, LayerSpec
from batching.worker.cpu.attention import CpuAttention

BLOCK = 32
SHAPES = {"16q/8kv d128": (16, 8, 128), "9q/3kv d64": (9, 3, 64)}
COLD_BYTES = 256 << 20


class Workload:
    """`batch` sequences that each add `queries` tokens up to `context`, in several page sets."""

    def __init__(
        self,
        backend: CpuAttention,
        shape: tuple[int, int, int],
        batch: int,
        context: int,
        queries: int,
        dtype: torch.dtype,
    ) -> None:
        heads, kv_heads, head_dim = shape
        self.spec = LayerSpec(heads, kv_heads, head_dim, head_dim**-0.5)
        self.backend, self.batch, self.context, self.queries = backend, batch, context, queries
        blocks = -(-context // BLOCK)
        self.bytes = batch * context * kv_heads * head_dim * 2 * dtype.itemsize
        sets = max(1, min(32, COLD_BYTES // self.bytes)) if queries == 1 else 1
        self.pages = [
            backend.allocate(self.spec, batch * blocks, BLOCK, dtype) for _ in range(sets)
        ]
        for pair in self.pages:
            for page in pair:
                page.normal_()
        tokens = batch * queries
        self.query = torch.randn(tokens, heads, head_dim, dtype=dtype)
        self.key = torch.randn(tokens, kv_heads, head_dim, dtype=dtype)
        self.value = torch.randn(tokens, kv_heads, head_dim, dtype=dtype)
        table = torch.randperm(batch * blocks).view(batch, blocks).to(torch.int32)
        position = torch.arange(context - queries, context)
        slots = table[:, position // BLOCK].long() * BLOCK + position % BLOCK
        self.metadata = AttentionMetadata(
            query_start=torch.arange(0, tokens + 1, queries, dtype=torch.int32),
            context=torch.full((batch,), context, dtype=torch.int32),
            block_tables=table,
            slot_mapping=slots.flatten(),
            block_size=BLOCK,
            counts=[queries] * batch,
            contexts=[context] * batch,
        )
        self.metadata.schedule = backend.prepare(self.metadata, [self.spec])
        self.mask = torch.arange(context) <= position[:, None]
        self.turn = 0

    def ours(self) -> None:
        self.turn = (self.turn + 1) % len(self.pages)
        self.backend.forward(
            self.query, self.key, self.value, self.pages[self.turn], self.spec, self.metadata
        )

    def sdpa(self) -> None:
        """Gathers every sequence's pages (here: takes them as [block, token, dim]) and attends."""
        self.turn = (self.turn + 1) % len(self.pages)
        table = self.metadata.block_tables.long()
        full = [self._gather(page, table) for page in self.pages[self.turn]]
        query = self.query.view(self.batch, self.queries, *self.query.shape[1:]).transpose(1, 2)
        causal = self.queries == self.context
        mask = None if causal or self.queries == 1 else self.mask
        F.scaled_dot_product_attention(
            query, full[0], full[1], attn_mask=mask, enable_gqa=True, is_causal=causal
        )

    def _gather(self, page: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        kv_heads, head_dim = self.spec.kv_heads, self.spec.head_dim
        rows = page.view(-1, kv_heads, BLOCK, head_dim)[table].transpose(1, 2)
        return rows.reshape(self.batch, kv_heads, -1, head_dim)[:, :, : self.context]

    @property
    def flops(self) -> float:
        """Of the two products, over visible keys only."""
        visible = self.queries * (self.context - (self.queries - 1) / 2)
        return 4 * self.batch * self.spec.heads * self.spec.head_dim * visible


def microseconds(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6


def read_bandwidth() -> Callable[[], None]:
    block = torch.zeros(COLD_BYTES // 4, dtype=torch.int32)
    return lambda: void(block.sum(dtype=torch.int32))


def void(_: object) -> None:
    return None


def medians(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median microseconds of each call, all taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            elapsed = microseconds(call)
            if turn >= 2:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(backend: CpuAttention, rounds: int, dtype: torch.dtype) -> list[dict[str, object]]:
    rows = []
    decode = [(b, c, 1) for b in (1, 8, 16, 64) for c in (128, 1024, 4096) if b * c <= 1 << 17]
    for name, shape in SHAPES.items():
        for batch, context, queries in [*decode, (1, 512, 512), (1, 2048, 2048), (1, 2048, 256)]:
            work = Workload(backend, shape, batch, context, queries, dtype)
            took = medians({"ours": work.ours, "sdpa": work.sdpa, "read": read_bandwidth()}, rounds)
            bandwidth = COLD_BYTES / took["read"] / 1e3
            rows.append(
                {
                    "shape": name,
                    "batch": batch,
                    "context": context,
                    "queries": queries,
                    "us": round(took["ours"], 1),
                    "sdpa_us": round(took["sdpa"], 1),
                    "kv_gb_per_s": round(work.bytes / took["ours"] / 1e3, 1),
                    "read_gb_per_s": round(bandwidth, 1),
                    "of_bandwidth": round(work.bytes / took["ours"] / 1e3 / bandwidth, 2),
                    "gflop_per_s": round(work.flops / took["ours"] / 1e3, 1),
                }
            )
            print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    rows = measure(CpuAttention(torch.device("cpu")), arguments.rounds, dtype)
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
