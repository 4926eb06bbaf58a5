"""Where there is no GPU, Triton interprets kernels. It reads this when it is imported."""

from __future__ import annotations

import os
from pathlib import Path

HAS_GPU = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()

if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
