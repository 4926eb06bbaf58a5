"""Settings of the process that runs the tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path

HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()

if not HAS_GPU:  # Triton interprets kernels: it reads this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Let no later search for garbage look at all that the tests have imported."""
    gc.collect()
    gc.freeze()
