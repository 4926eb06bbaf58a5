"""What one GPU reads per second, and what share of it our attention reads. Prints JSON.

    python -m tests.bench.gpu_machine

Bandwidth: copies of 2 GiB, bytes read and written counted. Attention: one layer's decode step over
keys and values that no cache holds, written tokens included in the time, the bytes of the context
alone in the share. Medians of 20 by CUDA events.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import msgspec
import torch

from batching.worker.attention import AttentionMetadata, LayerSpec
from batching.worker.attention_triton import TritonAttention

BLOCK = 32
ROUNDS = 20
# Heads, KV heads, sequences, context; head size 128, bfloat16.
SHAPES = {
    "L, 64 × 4k": (32, 8, 64, 4096),
    "M, 64 × 4k": (16, 8, 64, 4096),
    "L, 256 × 1k": (32, 8, 256, 1024),
    "L, 1 × 32k": (32, 8, 1, 32768),
}


def require_gpu() -> None:
    """End with a message where torch finds no CUDA device."""
    if not torch.cuda.is_available():
        sys.exit(f"needs an NVIDIA GPU, and torch {torch.__version__} finds none")


def milliseconds(run: Callable[[], object]) -> float:
    """The device's time for one call, median."""
    for _ in range(3):
        run()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes per second."""
    source = torch.ones(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source)) / 1e3)


def attention(heads: int, kv_heads: int, sequences: int, context: int) -> tuple[float, int]:
    """Milliseconds of a decode step's attention, and the bytes of its context."""
    device = torch.device("cuda")
    spec = LayerSpec(heads, kv_heads, 128, 128**-0.5)
    backend = TritonAttention(device)
    blocks = context // BLOCK
    pages = backend.allocate(spec, sequences * blocks, BLOCK, torch.bfloat16)
    for page in pages:
        page.normal_()
    backend.reserve([spec], sequences, context)
    table = torch.randperm(sequences * blocks, device=device).view(sequences, blocks)
    metadata = AttentionMetadata(
        query_start=torch.arange(sequences + 1, dtype=torch.int32, device=device),
        context=torch.full((sequences,), context, dtype=torch.int32, device=device),
        block_tables=table.int(),
        slot_mapping=table[:, -1] * BLOCK + BLOCK - 1,
        block_size=BLOCK,
        counts=[1] * sequences,
        contexts=[context] * sequences,
    )
    metadata.schedule = backend.prepare(metadata, [spec])
    query, key, value = (
        torch.randn(sequences, count, 128, dtype=torch.bfloat16, device=device)
        for count in (heads, kv_heads, kv_heads)
    )
    graph = torch.cuda.CUDAGraph()
    run = lambda: backend.forward(query, key, value, pages, spec, metadata)  # noqa: E731
    run()  # compiles
    with torch.cuda.graph(graph):
        run()
    return milliseconds(graph.replay), 2 * sequences * context * kv_heads * 128 * 2


def main() -> None:
    require_gpu()
    speed = bandwidth()
    torch.cuda.empty_cache()
    found: dict[str, object] = {"gpu": torch.cuda.get_device_name(), "bandwidth": speed}
    found["attention"] = {}
    for name, shape in SHAPES.items():
        took, size = attention(*shape)
        found["attention"][name] = {"ms": took, "share": size / (took / 1e3) / speed}  # type: ignore[index]
        torch.cuda.empty_cache()
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main()
