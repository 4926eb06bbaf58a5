"""What workers of all kinds report and decide while they start."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from batching.worker.protocol import UnsupportedModelError


class Phases:
    """Reports start-up phases as they begin, and sums the seconds of each."""

    def __init__(self, progress: Callable[[str, float], None]) -> None:
        self.report = progress
        self.seconds: dict[str, float] = {}
        self._name = ""
        self._start = 0.0

    def begin(self, name: str) -> None:
        """End the phase that runs, and begin one of this name."""
        self.end()
        self._name, self._start = name, time.perf_counter()
        self.report(name, 0.0)

    def end(self) -> None:
        """End the phase that runs, if any."""
        if self._name:
            passed = time.perf_counter() - self._start
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + passed
        self._name = ""


def choose_max_model_len(requested: int | None, text_config: Any, rope: int | None) -> int:
    """The longest sequence served: what was asked for, or the most that the model computes exactly.

    Raises `UnsupportedModelError` if more was asked for.
    """
    limits = {"its maximum position": getattr(text_config, "max_position_embeddings", None)}
    limits["what it computes before its rotary frequencies change"] = rope
    known = {reason: limit for reason, limit in limits.items() if limit is not None}
    kind = text_config.model_type
    if not known:
        if requested is None:
            raise UnsupportedModelError(f"{kind}: no maximum length known; set max_model_len")
        return requested
    reason, limit = min(known.items(), key=lambda item: item[1])
    if requested is not None and requested > limit:
        raise UnsupportedModelError(f"{kind}: max_model_len {requested} exceeds {reason}, {limit}")
    return requested or limit


def end_tokens(*configs: Any) -> tuple[int, ...]:
    """The token ids that end a text: those of the first config that knows any."""
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
    return ()
