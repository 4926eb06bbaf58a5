"""What the front end asks of engines; the supervised clients in `batching.engine` have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from batching.core.types import EngineStats, PoolRequest, Request
from batching.engine.client import RequestStream
from batching.engine.pool_client import PoolCall
from batching.worker.pool_protocol import PoolCapabilities
from batching.worker.protocol import Capabilities

Abilities = TypeVar("Abilities", covariant=True)


class Supervised(Protocol[Abilities]):
    """An engine of either kind."""

    stats: EngineStats
    failure: str | None  # why no engine serves now
    restarts: int
    resumed_streams: int

    @property
    def capabilities(self) -> Abilities | None: ...

    @property
    def alive(self) -> bool: ...


class Engine(Supervised[Capabilities], Protocol):
    """Generates (`batching.engine.client.EngineClient`)."""

    def submit(self, request: Request) -> RequestStream: ...


class PoolEngine(Supervised[PoolCapabilities], Protocol):
    """Pools (`batching.engine.pool_client.PoolClient`)."""

    def counts(self) -> tuple[int, int]: ...

    def submit(self, requests: Sequence[PoolRequest]) -> PoolCall: ...
