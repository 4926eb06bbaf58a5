"""The few questions whose answer depends on the kind of device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


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


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers, as a list or numpy array, on the device; never waits for it."""
    if device.type == "cpu":
        return torch.as_tensor(values, dtype=dtype)
    host = torch.as_tensor(values, dtype=dtype).pin_memory()  # which the allocator keeps till sent
    return host.to(device, non_blocking=True)


def free_bytes(device: torch.device) -> int:
    """Memory that could still be allocated now, in bytes.

    For the CPU this is what the kernel can hand out without swapping, or what is left of the
    control group's limit where that is less.
    """
    if device.type != "cpu":
        free, _ = torch.accelerator.get_memory_info(device)
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
