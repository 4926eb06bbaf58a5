"""What travels between the front end and the engine child, as length-prefixed msgpack frames.

The parent sends `Configure` once, then any number of `Submit`. The child sends `Progress` while
it starts, one `Ready`, then one `StepOutput` per step (and per idle second, as a heartbeat), or
one `Failed` before it exits. `Starting` precedes a step that may be the child's last.

A pooling child says `PoolReady` and `PoolOutput` instead, and is sent `PoolSubmit`.
"""

from __future__ import annotations

import msgspec

from batching.core.types import (
    EngineStats,
    PoolRequest,
    PoolResult,
    Request,
    StepSummary,
    TokenEvent,
)
from batching.worker.pool_protocol import PoolCapabilities
from batching.worker.protocol import Capabilities


class Configure(msgspec.Struct, frozen=True, tag="configure"):
    """The first message: the settings (`config.settings.EngineSettings` as plain JSON)."""

    settings: bytes


class Submit(msgspec.Struct, frozen=True, tag="submit", omit_defaults=True):
    """New requests and ids to abort, batched as they came."""

    requests: list[Request] = []
    aborts: list[str] = []


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """A start-up phase began; `fraction` (0..1) moves while weights load."""

    phase: str
    fraction: float = 0.0


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine serves from now on."""

    capabilities: Capabilities


class Starting(msgspec.Struct, frozen=True, tag="starting", omit_defaults=True):
    """A step begins that takes up requests or may take long. The supervisor wants to know.

    `admitted` are the ids of requests that no step touched before, or not since a preemption.
    `seconds` is the step's forecast; it is worth little unless `familiar` steps were run before.
    """

    step: int
    seconds: float
    familiar: bool = True
    admitted: list[str] = []


class StepOutput(msgspec.Struct, frozen=True, tag="step"):
    """Everything one step gave, for all requests at once. `step` is None if there was none."""

    events: list[TokenEvent]
    stats: EngineStats
    step: StepSummary | None = None


class PoolSubmit(msgspec.Struct, frozen=True, tag="pool_submit", omit_defaults=True):
    """New texts and ids of texts that nobody waits for any more."""

    requests: list[PoolRequest] = []
    aborts: list[str] = []


class PoolReady(msgspec.Struct, frozen=True, tag="pool_ready"):
    """The pooling engine serves from now on."""

    capabilities: PoolCapabilities


class PoolOutput(msgspec.Struct, frozen=True, tag="pool_output"):
    """The results of one batch, or none as a heartbeat. A batch counts as a step."""

    results: list[PoolResult]
    stats: EngineStats


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The child cannot go on. `refused` means a clear user error (no traceback to show)."""

    message: str
    refused: bool = False


ToEngine = Configure | Submit | PoolSubmit
FromEngine = Progress | Ready | Starting | StepOutput | PoolReady | PoolOutput | Failed
