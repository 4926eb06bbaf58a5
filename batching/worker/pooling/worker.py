"""The pooling worker that computes, on one device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

from batching.core.types import PoolRequest
from batching.worker.pool_protocol import PoolCapabilities, PoolConfig
from batching.worker.pooling.load import assemble
from batching.worker.start_up import Phases


class TorchPoolWorker:
    """Implements `pool_protocol.PoolWorker`. Raises `UnsupportedModelError`."""

    def __init__(
        self, config: PoolConfig, progress: Callable[[str, float], None] = lambda *_: None
    ) -> None:
        phases = Phases(progress)
        self._runner, self._head, self._capabilities = assemble(config, phases)
        phases.end()

    def capabilities(self) -> PoolCapabilities:
        return self._capabilities

    def run(self, batch: Sequence[PoolRequest]) -> list[bytes]:
        with torch.inference_mode():
            hidden = self._runner.hidden(batch)
            rows = [self._head(h, r.tokens) for h, r in zip(hidden, batch, strict=True)]
            numbers = torch.stack(rows).cpu().numpy()
        if sys.byteorder == "big":
            numbers = numbers.byteswap()
        return [row.tobytes() for row in numbers]
