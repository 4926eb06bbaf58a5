"""Kernels compiled together, for a GPU that is not there, in a process that does not interpret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
import triton
from triton.backends.compiler import GPUTarget

from batching.worker.compiling import compile_together
from batching.worker.fused_kernels import activate, normalize

compiled, launched = [], []


class Utils:
    def load_binary(self, name, *_):
        return name, name, 0, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 1 << 20}


class Driver:
    utils = Utils()
    get_current_device = staticmethod(lambda: 0)
    set_current_device = staticmethod(lambda device: None)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    def launcher_cls(self, source, metadata):
        return lambda *arguments: launched.append(metadata.name)


def note(*, fn, **_):
    compiled.append(fn.name)


triton.runtime.driver.set_active(Driver())
triton.knobs.runtime.jit_post_compile_hook = note
x = torch.empty(4, 64, dtype=torch.bfloat16, device="meta")


def run(width):
    normalize[(4,)](x, x, x, 1e-6, WIDTH=width, PADDED=64, num_warps=1)
    activate[4, 1](x, x, WIDTH=width, PIECE=1024)


compile_together(lambda: [run(64), run(48)])
assert sorted(compiled) == ["activate", "activate", "normalize", "normalize"], compiled
assert not launched
run(64)
run(48)
assert launched == ["normalize", "activate"] * 2, launched
assert len(compiled) == 4
compile_together(lambda: run(64))  # nothing is left out
assert len(launched) == 6
run(32)
assert len(compiled) == 6
"""


def test_what_a_rehearsal_asks_for_is_compiled_and_then_launched(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = kept | {"TRITON_CACHE_DIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
