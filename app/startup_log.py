"""What the operator sees while a server starts: progress lines, then a summary."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from batching.engine.messages import Progress
from batching.worker.protocol import Capabilities

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 1.0
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Bytes for people: `11.8 MiB`."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} B" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"


def startup_lines(capabilities: Capabilities, name: str, url: str) -> list[str]:
    """The summary of a started server; `name` is the model's public id."""
    c = capabilities
    tokens = c.num_blocks * c.block_size
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in c.phases.items())
    lines = [
        f"model     {name} ({c.architecture}, {size(c.weight_bytes)} of weights)",
        f"compute   {c.dtype} on {c.device}, {c.attention} attention",
        f"KV cache  {c.num_blocks:,} blocks of {c.block_size} tokens hold {tokens:,} tokens"
        f" ({size(c.kv_bytes)})",
        f"limits    {c.max_sequences:,} sequences at once, {c.max_model_len:,} tokens each",
    ]
    if phases:
        lines.append(f"started   in {sum(c.phases.values()):.1f} s: {phases}")
    return [*lines, f"ready     {url}"]


class ProgressLines:
    """Turns the engine's frequent progress messages into few lines.

    A phase's start is always said, its fraction at most once a second: small models load without
    a word, large ones visibly.
    """

    def __init__(self) -> None:
        self._phase = ""
        self._said = 0.0

    def line(self, phase: str, fraction: float, now: float) -> str | None:
        """The line to print at `now` (seconds), or None. `fraction` is 0 to 1."""
        if phase == self._phase and now - self._said < _SECONDS_BETWEEN_LINES:
            return None
        text = f"{phase} …" if phase != self._phase else f"{phase} {fraction:.0%}"
        self._phase, self._said = phase, now
        return text


_progress = ProgressLines()


def log_progress(progress: Progress) -> None:
    """Log an engine's start-up message if it brings news."""
    line = _progress.line(progress.phase, progress.fraction, time.monotonic())
    if line is not None:
        logger.info("%s", line)


def log_ready(capabilities: Capabilities, url: str, name: str | None = None) -> None:
    """Log the summary; `name` is the model's public id, by default its folder's name."""
    for line in startup_lines(capabilities, name or Path(capabilities.model).name, url):
        logger.info("%s", line)
