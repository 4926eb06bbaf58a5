"""The command line with real engines that run out of memory on SIGUSR1: `… starving serve …`."""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

from app.cli import main
from batching.engine import child
from batching.engine.client import EngineClient

_hoard = []


def starve(*_: object) -> None:
    """Take what memory there is, as a leak would, but for crumbs that Python can live on."""
    import torch

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)
    for size in (1 << 20, 1 << 14):
        try:
            while True:
                _hoard.append(torch.empty(size, dtype=torch.uint8))
        except RuntimeError:
            pass


if __name__ == "__main__":
    if sys.argv[1].isdigit():  # the socket of an engine child
        signal.signal(signal.SIGUSR1, starve)
        sys.exit(child.main(int(sys.argv[1])))
    defaults = EngineClient.__init__.__kwdefaults__  # type: ignore[misc]
    defaults["child_module"] = "tests.e2e.starving"
    sys.exit(main())
