"""The few questions whose answer depends on the kind of device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
ALIGNED = 16  # bytes; Triton compiles kernels anew for pointers to less

T = TypeVar("T")


def choose_device(requested: str) -> torch.device:
    """The device of that name; "auto" is the accelerator, if there is one, else the CPU."""
    if requested != "auto":
        return torch.device(requested)
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run natively rather than being emulated."""
    if device.type != "cpu":
        return True
    supported = torch.cpu.get_capabilities()
    return any(supported.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def serving_dtype(requested: str, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of weights and KV. "auto" is the stored one's, where the device is fast at it."""
    if requested != "auto":
        found: torch.dtype = getattr(torch, requested)
        return found
    if stored is None or stored == torch.float32:
        return torch.float32
    if device.type == "cpu":  # float16 is not fast on CPUs, and overflows where bfloat16 does not
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return stored


def compute_units(device: torch.device) -> int:
    """How many processors share the device's work."""
    if device.type == "cpu":
        return torch.get_num_threads()
    found = getattr(torch, device.type).get_device_properties(device)
    return int(getattr(found, "multi_processor_count", 0) or found.gpu_subslice_count)


def shared_memory(device: torch.device) -> int:
    """Bytes of fast memory in one of its processors, 0 if that is not known."""
    if device.type == "cpu":
        return 0
    found = getattr(torch, device.type).get_device_properties(device)
    return int(getattr(found, "shared_memory_per_multiprocessor", 0))


@cache
def has_triton(device: torch.device) -> bool:
    """Whether kernels written in Triton run there."""
    return device.type in ("cuda", "xpu") and find_spec("triton") is not None


def has_fp8(device: torch.device) -> bool:
    """Whether kernels can read float8 numbers there."""
    is_nvidia = device.type == "cuda" and not torch.version.hip
    return not is_nvidia or torch.cuda.get_device_capability(device) >= (8, 9)


def float32_products(device: torch.device) -> str:
    """How Triton multiplies float32 there: by three products of tensor cores, or plainly."""
    return "tf32x3" if device.type == "cuda" and not torch.version.hip else "ieee"


def upload(
    values: Any, dtype: torch.dtype, device: torch.device, into: torch.Tensor | None = None
) -> torch.Tensor:
    """Numbers, as a list, numpy array or tensor, on the device; never waits for it.

    They become the first of `into`, if that is given.
    """
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cpu":
        # Memory that the device can read by itself; the allocator keeps it until that is done.
        host = host.pin_memory()
    if into is not None:
        return into[: len(host)].copy_(host, non_blocking=True)
    return host if device.type == "cpu" else host.to(device, non_blocking=True)


def upload_together(
    parts: Sequence[np.ndarray], device: torch.device, into: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Arrays of 32-bit numbers on the device, by one copy, each at a multiple of `ALIGNED` bytes.

    The first comes at the beginning of `into` int32, if that is given; the others only if they fit.
    """
    step = ALIGNED // 4
    begins = list(accumulate((-(-part.size // step) * step for part in parts), initial=0))
    packed = np.zeros(begins[-1], np.int32)
    for part, begin in zip(parts, begins, strict=False):
        packed[begin : begin + part.size] = part.view(np.int32)
    if into is not None and len(packed) > len(into):
        upload(packed[: parts[0].size], torch.int32, device, into=into)
        into = None
    sent = upload(packed, torch.int32, device, into=into)
    return [
        _as_floats(sent[begin : begin + part.size], part.dtype == np.float32)
        for part, begin in zip(parts, begins, strict=False)
    ]


def _as_floats(numbers: torch.Tensor, is_wanted: bool) -> torch.Tensor:
    return numbers.view(torch.float32) if is_wanted else numbers


def fetch(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors on the host, by one copy; complete once the device's stream has come this far."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    packed = pack(tensors)
    host = torch.empty(len(packed), dtype=torch.uint8, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    return unpack(host, tensors)


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their bytes, one after the other; those of large elements first, so that all are aligned."""
    ordered = sorted(tensors, key=_element_size)
    parts = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in ordered]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What was packed, from its bytes."""
    order = sorted(range(len(like)), key=lambda index: _element_size(like[index]))
    parts = dict(zip(order, packed.split([like[index].nbytes for index in order]), strict=True))
    return [parts[i].view(tensor.dtype).view(tensor.shape) for i, tensor in enumerate(like)]


def _element_size(tensor: torch.Tensor) -> int:
    return -tensor.itemsize


def peak_bytes(device: torch.device, run: Callable[[], T]) -> tuple[T, int]:
    """What `run` returns, and the bytes that it takes on an accelerator at its peak."""
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    result = run()
    torch.accelerator.synchronize(device)
    peak = torch.accelerator.max_memory_allocated(device) - before
    torch.accelerator.empty_cache()
    return result, int(peak)


def free_pinned() -> None:
    """Give back the host's memory that devices read by themselves, where nothing uses it."""
    getattr(torch.accelerator, "empty_host_cache", lambda: None)()  # older torch keeps it


def free_bytes(device: torch.device) -> int:
    """Memory that could still be allocated now, in bytes.

    For the CPU this is what the kernel can hand out without swapping, or what is left of the
    control group's limit where that is less.
    """
    if device.type != "cpu":
        free, _ = getattr(torch, device.type).mem_get_info(device)
        unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(
            device
        )
        return int(free + unused)
    fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = int((CGROUP / "memory.max").read_text())  # "max" where there is no limit
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return min(available, limit - used)
