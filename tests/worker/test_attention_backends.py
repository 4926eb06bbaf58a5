"""Every CPU attention backend against dense float64 attention, over random geometry."""

from __future__ import annotations

import itertools

import pytest
import torch

from batching.worker.attention import (
    BACKENDS,
    AttentionMetadata,
    LayerSpec,
    choose_backend,
)
from batching.worker.protocol import UnsupportedModelError

BLOCK = 8
CPU = torch.device("cpu")
CPU_BACKENDS = [name for name in BACKENDS if name in ("reference", "cpu")]
SEQUENCES = ((1, 1), (1, 30), (5, 5), (7, 40), (1, 8), (20, 33))  # (queries, context)


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: LayerSpec
) -> torch.Tensor:
    """Attention of the last len(query) positions over all keys, float64, by definition."""
    count, context, group = len(query), len(key), spec.heads // spec.kv_heads
    output = torch.zeros(count, spec.heads, spec.head_dim, dtype=torch.float64)
    for i, head in itertools.product(range(count), range(spec.heads)):
        position = context - count + i
        first = 0 if spec.window is None else max(0, position + 1 - spec.window)
        scores = key[first : position + 1, head // group].double() @ query[i, head].double()
        scores = scores * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        if spec.sinks is not None:
            scores = torch.cat([scores, spec.sinks[head : head + 1].double()])
        weights = scores.softmax(-1)[: position + 1 - first]
        output[i, head] = weights @ value[first : position + 1, head // group].double()
    return output


@pytest.mark.parametrize("backend_name", CPU_BACKENDS)
@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(4, 4, 16, 0.25),
        LayerSpec(8, 2, 32, 0.2, window=7),
        LayerSpec(4, 2, 64, 0.3, softcap=3.0),
        LayerSpec(4, 1, 64, 0.125, window=1),
        LayerSpec(4, 2, 32, 0.2, window=12, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    ],
    ids=["plain", "window", "softcap", "window-1", "sinks"],
)
def test_backend_equals_dense_attention(spec: LayerSpec, backend_name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    backend = choose_backend(backend_name, CPU, [spec], torch.float32)
    pages = backend.allocate(spec, 64, BLOCK, torch.float32)
    order = torch.randperm(64, generator=generator).tolist()
    tables = torch.full((len(SEQUENCES), 8), -1, dtype=torch.int32)
    keys, values = (
        [torch.randn(c, spec.kv_heads, spec.head_dim, generator=generator) for _, c in SEQUENCES]
        for _ in range(2)
    )
    for row, (_, context) in enumerate(SEQUENCES):
        for column in range(-(-context // BLOCK)):
            tables[row, column] = order.pop()

    def run(ranges: list[tuple[int, int, int]], queries: torch.Tensor) -> torch.Tensor:
        """Attend with tokens start … stop-1 of sequences (row, start, stop), writing their keys."""
        mapping = [
            int(tables[row, p // BLOCK]) * BLOCK + p % BLOCK
            for row, start, stop in ranges
            for p in range(start, stop)
        ]
        counts = [stop - start for _, start, stop in ranges]
        rows = [row for row, _, _ in ranges]
        metadata = AttentionMetadata(
            query_start=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32),
            context=torch.tensor([stop for _, _, stop in ranges], dtype=torch.int32),
            block_tables=tables[rows],
            slot_mapping=torch.tensor(mapping),
            block_size=BLOCK,
            counts=counts,
            contexts=[stop for _, _, stop in ranges],
        )
        metadata.schedule = backend.prepare(metadata, [spec])
        key, value = (
            torch.cat([side[row][start:stop] for row, start, stop in ranges])
            for side in (keys, values)
        )
        return backend.forward(queries, key, value, pages, spec, metadata)

    shape = (spec.heads, spec.head_dim)
    earlier = [(row, 0, c - n) for row, (n, c) in enumerate(SEQUENCES) if c > n]
    run(earlier, torch.randn(sum(r[2] for r in earlier), *shape, generator=generator))
    queries = torch.randn(sum(n for n, _ in SEQUENCES), *shape, generator=generator)
    output = run([(row, c - n, c) for row, (n, c) in enumerate(SEQUENCES)], queries)
    first = 0
    for row, (count, _) in enumerate(SEQUENCES):
        own = slice(first, first + count)
        expected = dense(queries[own], keys[row], values[row], spec)
        torch.testing.assert_close(output[own].double(), expected, atol=2e-5, rtol=1e-4)
        first += count


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="nonsense"):
        choose_backend("nonsense", CPU, [], torch.float32)
