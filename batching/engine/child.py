"""The engine child process: `python -m batching.engine.child FD`.

It is started with its OpenMP environment already set (`config.child_environment`), receives its
settings over the socket `FD`, builds the worker, and serves until the front end goes away.
"""

from __future__ import annotations

import gc
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

from batching.core.event_log import RecordingScheduler
from batching.core.scheduler import Scheduler
from batching.core.types import Limits
from batching.engine.channel import ChannelClosed, ChildChannel
from batching.engine.child_warnings import noted_warnings
from batching.engine.log_ring import LogRing
from batching.engine.loop import EngineLoop
from batching.engine.messages import Configure, Failed, Progress, Ready, Submit
from batching.engine.sizes import sizes_of
from batching.worker.lifeline import end_with_parent
from batching.worker.protocol import Capabilities, UnsupportedModelError, Worker, WorkerConfig
from config.settings import EngineSettings

SIMULATED_BLOCKS = 65_536  # a pool that is never the limit


def main(fd: int) -> int:
    """Run the engine on an inherited socket. Returns the process's exit code."""
    return run_child(fd, _serve)


def run_child(fd: int, serve: Callable[[ChildChannel], None]) -> int:
    """Call `serve`, and tell the front end why it ended unless that is gone itself."""
    for number in (signal.SIGINT, signal.SIGTERM):  # for the front end, even if sent to us too
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    channel = ChildChannel(socket.socket(fileno=fd))
    try:
        serve(channel)
    except ChannelClosed:
        return 0
    except Exception as error:
        refused = isinstance(error, UnsupportedModelError)
        if not refused:
            traceback.print_exc()
        try:
            channel.send(
                Failed(f"{error}" if refused else f"{type(error).__name__}: {error}", refused)
            )
        except ChannelClosed:
            pass
        return 1
    return 0


def _serve(channel: ChildChannel) -> None:
    (configure,) = channel.receive(None)
    assert isinstance(configure, Configure)
    settings = EngineSettings.model_validate_json(configure.settings)
    with noted_warnings() as warnings:
        worker = _build_worker(settings, lambda phase, done: channel.send(Progress(phase, done)))
    try:
        capabilities = msgspec.structs.replace(worker.capabilities(), warnings=tuple(warnings))
        scheduler = _build_scheduler(settings, _limits(settings, capabilities))
        loop = EngineLoop(
            scheduler,
            worker,
            lambda timeout: [m for m in channel.receive(timeout) if isinstance(m, Submit)],
            channel.send,
            capabilities.overlap,
        )
        gc.collect()
        gc.freeze()  # the model's objects live for ever: keep collections short
        channel.send(Ready(capabilities))
        loop.run_forever()
    finally:
        worker.close()


def _build_worker(settings: EngineSettings, progress: Callable[[str, float], None]) -> Worker:
    sizes = sizes_of(settings)._asdict()
    if settings.worker == "simulated":
        from batching.worker.simulated import SimulatedWorker, folder_capabilities

        return SimulatedWorker(
            folder_capabilities(
                settings.model,
                num_blocks=settings.num_blocks or SIMULATED_BLOCKS,
                block_size=settings.block_size,
                **sizes,
                max_model_len=settings.max_model_len,
            )
        )
    shared = {name: getattr(settings, name) for name in WorkerConfig.__struct_fields__}
    shared |= sizes
    if settings.tensor_parallel > 1:
        from batching.worker.parallel import ParallelWorker

        return ParallelWorker(WorkerConfig(**shared), progress)
    from batching.worker.torch_worker import TorchWorker

    return TorchWorker(WorkerConfig(**shared), progress)


def _build_scheduler(settings: EngineSettings, limits: Limits) -> Scheduler:
    if settings.event_log is None:
        return Scheduler(limits)
    recorder = LogRing(Path(settings.event_log), int(settings.event_log_mib * 2**20))
    return RecordingScheduler(limits, write=recorder.write)


def _limits(settings: EngineSettings, capabilities: Capabilities) -> Limits:
    return Limits(
        num_blocks=capabilities.num_blocks,
        block_size=capabilities.block_size,
        max_sequences=capabilities.max_sequences,
        max_model_len=capabilities.max_model_len,
        max_step_tokens=capabilities.max_step_tokens,
        inter_token_target=settings.inter_token_target_ms / 1e3,
        policy="fcfs" if settings.policy == "auto" else settings.policy,
        prefix_caching=settings.prefix_caching,
        overlap=capabilities.overlap,
    )


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
