"""The environment of the engine child, fixed before any library of it loads.

OpenMP's default is to spin at every barrier. On a machine whose cores also run the front end and
its clients, a spinning thread waits for a descheduled one and a 0.4 ms product takes 8 ms; so the
child's threads spin briefly and then sleep.
"""

from __future__ import annotations

import os
import sys

# Bounded spinning for both runtimes torch may be linked with: GNU's counts iterations (about
# 10 microseconds here), LLVM's and Intel's count milliseconds.
_SPIN = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "0"}


def available_cores() -> int:
    """Cores this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def child_environment(threads: int | None) -> dict[str, str]:
    """This process's environment with OpenMP settings added; the user's own ones win."""
    ours = {
        "OMP_NUM_THREADS": str(threads or available_cores()),
        "TOKENIZERS_PARALLELISM": "false",
        **_SPIN,
    }
    return ours | dict(os.environ)


def rank_environment(rank: int) -> dict[str, str]:
    """This process's environment for a process that computes on the device of that number."""
    return dict(os.environ) | {"LOCAL_RANK": str(rank)}
