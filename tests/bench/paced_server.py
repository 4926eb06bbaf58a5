"""`slipstream` with a simulated model whose every step takes BENCH_STEP_MS, and a profiler.

    BENCH_STEP_MS=20 BENCH_PROFILE=FILE python -m tests.bench.paced_server serve MODEL …

The first SIGUSR1 starts cProfile in the front end, the second ends it and writes FILE: so a profile
has no start-up in it. As the engine child, it runs with a file descriptor as its only argument.
"""

from __future__ import annotations

import cProfile
import functools
import os
import signal
import sys
import types
from unittest import mock

_MODULE = "tests.bench.paced_server"


def serve() -> int:
    """Run the command line with our engine child in place of the usual one."""
    from app.cli import main
    from batching.engine.client import EngineClient

    paced = functools.partial(EngineClient, child_module=_MODULE)
    profile, running = cProfile.Profile(), False

    def switch(number: int, frame: types.FrameType | None) -> None:
        nonlocal running
        if running:
            profile.disable()
            profile.dump_stats(os.environ["BENCH_PROFILE"])
        else:
            profile.enable()
        running = not running

    signal.signal(signal.SIGUSR1, switch)
    with mock.patch("app.engines.EngineClient", paced):
        return main()


def be_engine(descriptor: int) -> int:
    """The engine child, with a simulated worker that takes its time."""
    from batching.engine import child
    from batching.worker import simulated

    cost = simulated.StepCost(fixed=float(os.environ["BENCH_STEP_MS"]) / 1e3)
    paced = functools.partial(simulated.SimulatedWorker, cost=cost)
    with mock.patch.object(simulated, "SimulatedWorker", paced):
        return child.main(descriptor)


if __name__ == "__main__":
    alone = len(sys.argv) == 2 and sys.argv[1].isdigit()
    sys.exit(be_engine(int(sys.argv[1])) if alone else serve())
