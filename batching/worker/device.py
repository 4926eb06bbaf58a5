"""The few questions whose answer depends on the kind of device."""

from __future__ import annotations

from pathlib import Path

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
