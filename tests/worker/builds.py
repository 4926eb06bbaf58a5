"""The C++ kernels for other CPUs than this one, not optimised: they compile many times as fast."""

from batching.worker.cpu.build import NATIVE

QUICK = "-O0"  # the last level given counts
EMULATED_AMX = (*NATIVE, "-DSLIPSTREAM_EMULATE_AMX", QUICK)
