"""The machine's limits, measured, and the time they allow a model at best.

    python -m tests.bench.machine

prints bytes read per second, bf16 (and float32) operations per second and what other processes
left of the cores, as JSON.

What a perfect server would need (no KV cache, no attention, no overhead counted):

    one token of one stream = weight bytes / bandwidth
    prefill                 = 2 x parameters without the embedding x prompt tokens / speed
    one decode step         = max(weight bytes / bandwidth, 2 x parameters x sequences / speed)
    output tokens/s         = output tokens / (prefill + decode steps)
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from struct import unpack
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import torch


class Machine(msgspec.Struct, frozen=True):
    """Bytes/s read from memory by all cores; operations/s (a multiply-add is two); idle share."""

    bandwidth: float
    bf16: float  # float32's where the cores have no bf16: emulating it is far slower
    float32: float
    idle: float  # of all cores in the second before the measurement, 0 to 1


@dataclass(frozen=True)
class ModelSize:
    """Bytes of weights that a decode step reads, and parameters that take part in a product."""

    weight_bytes: int
    parameters: int  # with the LM head
    layer_parameters: int  # without: prefill needs the head for one row only


def model_size(folder: Path) -> ModelSize:
    """From the headers of the safetensors files. A tied embedding is the LM head too."""
    config = json.loads((folder / "config.json").read_bytes())
    shapes: dict[str, tuple[int, int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(unpack("<Q", stream.read(8))[0]))
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                shapes[name] = (math.prod(tensor["shape"]), end - begin)
    tables = [name for name in shapes if "embed_tokens" in name]
    if not config.get("tie_word_embeddings", False):
        for name in tables:  # rows are looked up, not read through
            del shapes[name]
    head = [name for name in shapes if "embed_tokens" in name or "lm_head" in name]
    parameters = sum(count for count, _ in shapes.values())
    return ModelSize(
        weight_bytes=sum(size for _, size in shapes.values()),
        parameters=parameters,
        layer_parameters=parameters - sum(shapes[name][0] for name in head),
    )


def token_seconds(model: ModelSize, machine: Machine, sequences: int = 1) -> float:
    """The least time of one decode step."""
    return max(
        model.weight_bytes / machine.bandwidth,
        2 * model.parameters * sequences / machine.bf16,
    )


def output_rate(
    model: ModelSize, machine: Machine, *, prompt_tokens: int, output_tokens: int, sequences: int
) -> float:
    """The most output tokens per second for totals of a run with `sequences` in flight."""
    prefill = 2 * model.layer_parameters * prompt_tokens / machine.bf16
    steps = math.ceil(output_tokens / sequences)
    return output_tokens / (prefill + steps * token_seconds(model, machine, sequences))


def measure() -> Machine:
    """Takes about five seconds and 1 GiB; the best of several tries counts."""
    import torch

    from batching.worker.device import has_fast_bfloat16

    idle, float32 = _idle_share(1.0), _speed(torch.float32)
    has_bf16 = has_fast_bfloat16(torch.device("cpu"))
    return Machine(_bandwidth(), _speed(torch.bfloat16) if has_bf16 else float32, float32, idle)


def _bandwidth() -> float:
    import torch

    data = torch.ones(1 << 28)  # 1 GiB, far beyond any cache
    # Both operands are the same memory, so it is read once.
    return data.numel() * 4 / min(_seconds(lambda: torch.dot(data, data)) for _ in range(5))


def _speed(dtype: torch.dtype) -> float:
    import torch

    size = 2048
    left, right = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(_seconds(lambda: left @ right) for _ in range(8))


def _seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _idle_share(seconds: float) -> float:
    def ticks() -> tuple[int, int]:
        values = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return values[3] + values[4], sum(values[:8])

    idle, total = ticks()
    time.sleep(seconds)
    idle_after, total_after = ticks()
    return (idle_after - idle) / (total_after - total)


if __name__ == "__main__":
    print(msgspec.json.encode(measure()).decode())
