"""Triton kernels compiled beside each other, before the first of them is launched.

Where it is new to the machine each takes about a second, its launcher in C included, and hardly any
of that holds Python's lock. A start asks for many of them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton

THREADS = 16


def compile_together(rehearse: Callable[[], object]) -> None:
    """Compile the kernels that `rehearse` would launch.

    It runs once, without those: its results mean nothing, and nothing in it may use one as an
    index. Nothing happens where Triton interprets.
    """
    runtime: Any = triton.knobs.runtime
    if runtime.interpret:
        return
    asked: dict[tuple[int, Any], tuple[Any, str]] = {}

    def note(*, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        asked[id(fn.jit_function), key] = fn.jit_function, compile["specialization_data"]
        return True  # do not compile and launch it now

    before, runtime.jit_cache_hook = runtime.jit_cache_hook, note
    try:
        rehearse()
    finally:
        runtime.jit_cache_hook = before
    if asked:
        driver = triton.runtime.driver.active
        here = driver.get_current_device()  # is a thread's
        with ThreadPoolExecutor(THREADS, "compile", driver.set_current_device, (here,)) as pool:
            list(pool.map(_compile, asked.values()))


def _compile(asked: tuple[Any, str]) -> None:
    function, how = asked
    kernel = function.preload(how)
    kernel.run  # noqa: B018 (it makes the launcher, and loads both)
