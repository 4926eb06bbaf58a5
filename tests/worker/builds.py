"""The C++ kernels for other CPUs than this one, optimised little: they compile twice as fast."""

from batching.worker.cpu.build import NATIVE

QUICK = "-O1"  # the last level given counts
EMULATED_AMX = (*NATIVE, "-DSLIPSTREAM_EMULATE_AMX", QUICK)
