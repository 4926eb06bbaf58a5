"""The pooling engine's child process: `python -m batching.engine.pool_child FD`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import msgspec

from batching.core.pool_queue import BatchSize
from batching.engine.channel import ChildChannel
from batching.engine.child import run_child
from batching.engine.child_warnings import noted_warnings
from batching.engine.messages import Configure, PoolReady, PoolSubmit, Progress
from batching.engine.pool_loop import PoolLoop
from batching.engine.sizes import sizes_of
from batching.worker.pool_protocol import PoolConfig, PoolWorker
from config.settings import EngineSettings

BuildWorker = Callable[[EngineSettings, Callable[[str, float], None]], PoolWorker]


def build_worker(settings: EngineSettings, progress: Callable[[str, float], None]) -> PoolWorker:
    """The worker that computes. Raises `UnsupportedModelError`."""
    from batching.worker.pooling.worker import TorchPoolWorker

    shared = {name: getattr(settings, name) for name in PoolConfig.__struct_fields__}
    return TorchPoolWorker(PoolConfig(**shared), progress)


def serve(channel: ChildChannel, build: BuildWorker = build_worker) -> None:
    """Build the worker and serve until the front end goes away."""
    (configure,) = channel.receive(None)
    assert isinstance(configure, Configure)
    settings = EngineSettings.model_validate_json(configure.settings)
    with noted_warnings() as warnings:
        worker = build(settings, lambda phase, done: channel.send(Progress(phase, done)))
    capabilities = msgspec.structs.replace(worker.capabilities(), warnings=tuple(warnings))
    sizes = sizes_of(settings)
    loop = PoolLoop(
        worker,
        lambda timeout: [m for m in channel.receive(timeout) if isinstance(m, PoolSubmit)],
        channel.send,
        size=BatchSize(settings.inter_token_target_ms / 1e3, sizes.max_step_tokens),
        max_requests=sizes.max_sequences,
    )
    gc.collect()
    gc.freeze()  # the model's objects live for ever: keep collections short
    channel.send(PoolReady(capabilities))
    loop.run_forever()


if __name__ == "__main__":
    sys.exit(run_child(int(sys.argv[1]), serve))
