"""The command line with engines that fail as asked: `python -m tests.e2e.faulty_cli serve …`.

Everything is the real thing but the workers, see `tests.engine.faulty_child`: tokens are made up,
one step takes a few milliseconds, and a restart no longer than Python does.
"""

from __future__ import annotations

import sys

from app.cli import main
from batching.engine import process, restart_policy
from batching.engine.client import EngineClient
from batching.engine.pool_client import PoolClient

if __name__ == "__main__":
    for client, module in (
        (EngineClient, "tests.e2e.faulty_child"),
        (PoolClient, "tests.engine.faulty_pool_child"),
    ):
        defaults = client.__init__.__kwdefaults__  # type: ignore[attr-defined]
        defaults["child_module"] = module
    restart_policy._LONGEST_DELAY = 0.5  # tests have many faults in ten minutes
    process.SILENCE_SECONDS = 2.0
    process._DEVICE_SILENCE_SECONDS["none"] = 2.0
    sys.exit(main())
