"""An engine child with faults: `python -m tests.engine.faulty_child FD`.

A request whose prompt begins with a fault's number brings it about whenever it is computed, as a
bug in a kernel would; all others get the simulated worker's tokens, one every few milliseconds.
The memory that is free is `free_blocks` of the model's config.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

from batching.core.types import StepPlan, StepResult
from batching.engine import child
from batching.engine.sizes import sizes_of
from batching.worker.protocol import Capabilities, Worker, WorkerError
from batching.worker.simulated import SimulatedWorker, StepCost, folder_capabilities
from config.settings import EngineSettings

STEP_SECONDS = 0.002


class Fault(IntEnum):
    """What a prompt may begin with."""

    RAISE = 990
    OUT_OF_MEMORY = 991
    KILL = 992
    SEGFAULT = 993
    HANG = 994
    RAISE_LATE = 995  # in the fourth step after each start


class FaultyWorker(SimulatedWorker):
    """Fails as asked."""

    def __init__(self, capabilities: Capabilities, cost: StepCost) -> None:
        super().__init__(capabilities, cost)
        self._steps: dict[int, int] = {}  # of a slot, since its request entered it
        self._faults: dict[int, Fault] = {}

    def submit(self, plan: StepPlan) -> StepPlan:
        for init in plan.inits:
            self._steps[init.slot] = 0
            self._faults.pop(init.slot, None)
            if init.tokens[0] in set(Fault):
                self._faults[init.slot] = Fault(init.tokens[0])
        return plan

    def wait(self, handle: StepPlan) -> StepResult:
        for sequence in handle.sequences:
            self._steps[sequence.slot] += 1
            fault = self._faults.get(sequence.slot)
            if fault is not None:
                fail(fault, self._steps[sequence.slot])
        return super().wait(handle)


def fail(fault: Fault, step: int) -> None:
    """Bring a fault about in the step so many steps after its cause came."""
    if fault is Fault.RAISE or (fault is Fault.RAISE_LATE and step == 4):
        raise WorkerError("a kernel failed")
    if fault is Fault.OUT_OF_MEMORY:
        bytearray(1 << 46)  # more than there are addresses
    if fault in (Fault.KILL, Fault.SEGFAULT):
        number = signal.SIGKILL if fault is Fault.KILL else signal.SIGSEGV
        os.kill(os.getpid(), number)
    if fault is Fault.HANG:
        time.sleep(3600)


def _build_worker(settings: EngineSettings, progress: Callable[[str, float], None]) -> Worker:
    config = json.loads((Path(settings.model) / "config.json").read_text())
    capabilities = folder_capabilities(
        settings.model,
        num_blocks=settings.num_blocks or config.get("free_blocks", child.SIMULATED_BLOCKS),
        block_size=settings.block_size,
        **sizes_of(settings)._asdict(),
        max_model_len=settings.max_model_len,
    )
    return FaultyWorker(capabilities, StepCost(fixed=STEP_SECONDS))


if __name__ == "__main__":
    child._build_worker = _build_worker
    sys.exit(child.main(int(sys.argv[1])))
