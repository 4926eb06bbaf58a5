"""How the process ends: what signals do, and how open requests are brought to an end.

    first SIGTERM or SIGINT   /health says so, new work is refused, open requests go on
    `drain_seconds` later     what is still open ends with an error that says why
    SIGINT once more          everything ends at once

Exit status: 0 after an orderly end, whether or not requests had to be cut off; 128 and the signal's
number if it came before the server served, or for the last time; 1 if no engine serves any more,
nor will, since whoever started the server can start it again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_LAST_WORDS_SECONDS = 2.0  # for requests that are cut off, to say so
_TICK_SECONDS = 0.05


class Signals:
    """SIGTERM and SIGINT from its making on. `kill` ends whatever would outlive this process."""

    def __init__(self, kill: Callable[[], None]) -> None:
        self._kill = kill
        self._first: int | None = None
        self._came = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._handle, number)

    @property
    def status(self) -> int:
        """The exit status of a process that a signal ended."""
        return 128 + (self._first or 0)

    async def wait(self) -> None:
        """Until the first one came."""
        await self._came.wait()

    async def unless_told(self, work: Coroutine[Any, Any, Result]) -> Result | None:
        """The work's result; None if a signal came first, and the work was cancelled."""
        task, told = asyncio.create_task(work), asyncio.create_task(self.wait())
        await asyncio.wait({task, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            return None
        return task.result()

    def _handle(self, number: int) -> None:
        if self._first is None:
            self._first = number
            self._came.set()
        elif number == signal.SIGINT:
            self._kill()
            os._exit(128 + number)


async def drain(requests: set[asyncio.Task[None]], seconds: float) -> None:
    """Wait until the tasks of all requests have ended; cancel those that do not in time."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    if requests:
        logger.info("shutting down: %d requests are open and have %g s", len(requests), seconds)
    while requests and loop.time() < deadline:
        await asyncio.sleep(_TICK_SECONDS)
    if requests:
        logger.warning("shutting down: %d requests are cut off", len(requests))
        late = set(requests)
        for task in late:
            task.cancel()
        await asyncio.wait(late, timeout=_LAST_WORDS_SECONDS)
