"""Work for threads: what would hold up the event loop."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

# Preparing a body below this size takes less time than handing it to a thread.
_INLINE_BYTES = 16384
# Tokenising text takes some 70 times its size: of more than this, only one at a time.
_LARGE_BYTES = 1 << 20
_large = ThreadPoolExecutor(1, thread_name_prefix="large")
# glibc would keep that memory, each thread for itself.
_give_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)


async def prepare(work: Callable[[], Result], body_bytes: int) -> Result:
    """Run a handler's checks, rendering and encoding, off the event loop when there is much."""
    if body_bytes <= _INLINE_BYTES:
        return work()
    if body_bytes <= _LARGE_BYTES:
        return await asyncio.to_thread(work)
    return await asyncio.get_running_loop().run_in_executor(_large, _and_give_back, work)


def _and_give_back(work: Callable[[], Result]) -> Result:
    try:
        return work()
    finally:
        _give_back(0)
