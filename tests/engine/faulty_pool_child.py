"""A pooling child with faults: `python -m tests.engine.faulty_pool_child FD`.

A text's numbers are its tokens; one that begins with a fault's number brings it about.
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Callable, Sequence

from batching.core.types import PoolRequest
from batching.engine.child import run_child
from batching.engine.pool_child import serve
from batching.worker.pool_protocol import PoolCapabilities
from config.settings import EngineSettings
from tests.engine.faulty_child import Fault, fail

BATCH_SECONDS = 0.01


class FaultyPoolWorker:
    """Fails as asked, and takes its time otherwise."""

    def __init__(self, settings: EngineSettings, _: Callable[[str, float], None]) -> None:
        self._model = settings.model

    def capabilities(self) -> PoolCapabilities:
        return PoolCapabilities(
            self._model, "Faulty", "embed", 2, 1000, 256, "float32", "none", "none", "packed"
        )

    def run(self, batch: Sequence[PoolRequest]) -> list[bytes]:
        time.sleep(BATCH_SECONDS)
        for request in batch:
            if request.tokens[0] in set(Fault):
                fail(Fault(request.tokens[0]), step=1)
        return [array("f", request.tokens).tobytes() for request in batch]


if __name__ == "__main__":
    sys.exit(run_child(int(sys.argv[1]), lambda channel: serve(channel, FaultyPoolWorker)))
