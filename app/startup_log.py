"""What the operator sees while a server starts: progress lines, then a summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from batching.engine.messages import Progress
from batching.worker.pool_protocol import PoolCapabilities
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


Started = Mapping[str, Capabilities | PoolCapabilities]
"""What each model that serves now can do, by public id."""


def startup_lines(models: Started, url: str) -> list[str]:
    """The summary of a started server."""
    lines = []
    for name, capabilities in models.items():
        weights = f"{capabilities.architecture}, {size(capabilities.weight_bytes)} of weights"
        lines += [f"model     {name} ({weights})", *_describe(capabilities)]
        phases = [f"{phase} {seconds:.1f} s" for phase, seconds in capabilities.phases.items()]
        if phases:
            total = sum(capabilities.phases.values())
            lines.append(f"started   in {total:.1f} s: {', '.join(phases)}")
    return [*lines, f"ready     {url}"]


def _describe(c: Capabilities | PoolCapabilities) -> list[str]:
    if isinstance(c, PoolCapabilities):
        gives = (
            f"embeddings of {c.size:,} numbers, pooled by {c.pooling}"
            if c.task == "embed"
            else f"{c.size:,} label{'s' * (c.size > 1)}"
        )
        return [
            f"gives     {gives}",
            f"compute   {c.dtype} on {c.device}, {c.runner} batches",
            f"limits    {c.max_model_len:,} tokens each",
        ]
    tokens = c.num_blocks * c.block_size
    return [
        f"compute   {c.dtype} on {c.device}, {c.attention} attention",
        f"KV cache  {c.num_blocks:,} blocks of {c.block_size} tokens hold {tokens:,} tokens"
        f" ({size(c.kv_bytes)}{f', {c.kv_dtype}' if c.kv_dtype not in ('', c.dtype) else ''})",
        f"limits    {c.max_sequences:,} sequences at once, {c.max_model_len:,} tokens each",
    ]


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


def progress_log(name: str = "") -> Callable[[Progress], None]:
    """Logs an engine's start-up messages, those that bring news, under the model's name if any."""
    lines = ProgressLines()

    def log(progress: Progress) -> None:
        line = lines.line(progress.phase, progress.fraction, time.monotonic())
        if line is not None:
            logger.info("%s", f"{name}: {line}" if name else line)

    return log


def log_ready(models: Started, url: str) -> None:
    """Log the summary, and what is not as it should be."""
    for name, capabilities in models.items():
        for warning in capabilities.warnings:
            logger.warning("%s works, but: %s", name, warning)
    for line in startup_lines(models, url):
        logger.info("%s", line)
