"""The C++ kernels share torch's OpenMP runtime, also where other libraries bring their own."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import sklearn.cluster  # loads the OpenMP library of its package
import torch
from pathlib import Path
from batching.worker.cpu.attention import SOURCE
from batching.worker.cpu.build import load_library, openmp_runtime

maps = Path("/proc/self/maps").read_text()
assert "scikit_learn.libs/libgomp" in maps
assert openmp_runtime().parent == Path(torch.__file__).parent / "lib"
load_library(SOURCE)
print("loaded")
"""


def test_a_second_openmp_library_is_no_obstacle() -> None:
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert done.stdout == "loaded\n", done.stderr
