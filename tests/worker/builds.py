"""The C++ kernels for other CPUs than this one, hardly optimised: they compile twice as fast."""

from pathlib import Path

import pytest

from batching.worker.cpu.build import NATIVE

QUICK = "-O1"  # the last level given counts
EMULATED_AMX = (*NATIVE, "-DSLIPSTREAM_EMULATE_AMX", QUICK)
OTHERS = {"x86-64": {"sse2"}, "x86-64-v3": {"avx2", "fma"}, "x86-64-v4": {"avx512vl"}}


def lesser(target: str, factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """Where to build for one of `OTHERS`, and how; skips the test if this CPU cannot run it."""
    missing = OTHERS[target] - set(Path("/proc/cpuinfo").read_text().split())
    if missing:
        pytest.skip(f"this CPU lacks {missing}")
    return factory.getbasetemp() / "lesser", (f"-march={target}", QUICK)
