"""Tensor parallelism: one process a device, all of which compute a share of every layer.

The model's own plan (`base_model_tp_plan`) says how transformers cuts its weights; each rank has a
share of the heads, and so of the KV pages. Rank 0 is a part of the engine's process. It sends each
plan to the others before it runs it, and they build the same step from it. All have the whole
logits; rank 0 samples, and its tokens are broadcast on the devices into every rank's token rows.

    rank 0   plan ─┬─ inputs ── layer ⇄ layer ⇄ … ── logits ── sample ─┬─ append
    rank 1         └─ inputs ── layer ⇄ layer ⇄ … ── logits ───────────┴─ append
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from batching.core.types import StepPlan, StepResult
from batching.worker.device import choose_device
from batching.worker.lifeline import end_with_parent
from batching.worker.peers import Peers
from batching.worker.protocol import (
    Capabilities,
    UnsupportedModelError,
    WorkerConfig,
    WorkerError,
)
from batching.worker.torch_worker import PendingStep, TorchWorker
from config.child_environment import rank_environment

STOP_SECONDS = 5.0


class Share(msgspec.Struct, frozen=True):
    """What a rank is told first: its number, and the file by which all find each other."""

    config: WorkerConfig
    rank: int
    size: int
    meeting: str


class ParallelWorker:
    """Implements `protocol.Worker` as rank 0 of `config.tensor_parallel`.

    Raises `UnsupportedModelError` if the model cannot be divided so, or there are too few devices.
    """

    def __init__(
        self, config: WorkerConfig, progress: Callable[[str, float], None] = lambda *_: None
    ) -> None:
        size, device = config.tensor_parallel, choose_device(config.device)
        if device.type != "cpu" and (found := torch.accelerator.device_count()) < size:
            raise UnsupportedModelError(f"tensor_parallel is {size}, and there are {found} devices")
        if device.type == "cpu":
            threads = config.threads or torch.get_num_threads()
            config = msgspec.structs.replace(config, threads=max(1, threads // size))
        self._folder = tempfile.TemporaryDirectory(prefix="slipstream-ranks-")
        meeting = str(Path(self._folder.name) / "meeting")
        self._ranks = [_Rank(Share(config, rank, size, meeting)) for rank in range(1, size)]
        self._worker: TorchWorker | None = None
        try:
            self._worker = join(Share(config, 0, size, meeting), progress)
        except BaseException:
            for rank in self._ranks:
                rank.kill()
            self.close()
            raise

    def capabilities(self) -> Capabilities:
        assert self._worker is not None
        return self._worker.capabilities()

    def submit(self, plan: StepPlan) -> PendingStep:
        assert self._worker is not None
        message = msgspec.msgpack.encode(plan)
        for rank in self._ranks:
            rank.send(message)
        return self._worker.submit(plan)

    def wait(self, handle: PendingStep) -> StepResult:
        assert self._worker is not None
        return self._worker.wait(handle)

    def close(self) -> None:
        """End all ranks."""
        for rank in self._ranks:
            rank.end()
        if self._worker is not None:
            self._worker.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._folder.cleanup()


class _Rank:
    """One of the other ranks' processes, seen from rank 0."""

    def __init__(self, share: Share) -> None:
        self._plans, theirs = Pipe()
        command = [sys.executable, "-m", "batching.worker.parallel", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=rank_environment(share.rank)
        )
        theirs.close()
        self._plans.send_bytes(msgspec.msgpack.encode(share))

    def send(self, message: bytes) -> None:
        try:
            self._plans.send_bytes(message)
        except OSError as error:
            raise WorkerError(f"a rank is gone (exit code {self._process.poll()})") from error

    def end(self) -> None:
        self._plans.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:  # in the middle of something that others left
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def join(share: Share, progress: Callable[[str, float], None]) -> TorchWorker:
    """Meet the other ranks, and load this rank's share of the model."""
    device = choose_device(share.config.device)
    config = share.config
    if device.type != "cpu":
        config = msgspec.structs.replace(config, device=f"{device.type}:{share.rank}")
        torch.accelerator.set_device_index(share.rank)
    peers = Peers(share.rank, share.size, share.meeting, device.type)
    return TorchWorker(config, progress, peers)


def serve(plans: Connection) -> None:
    """Run what rank 0 sends until it closes the connection."""
    share = msgspec.msgpack.decode(plans.recv_bytes(), type=Share)
    worker = join(share, lambda *_: None)
    decoder = msgspec.msgpack.Decoder(StepPlan)
    overlap = worker.capabilities().overlap
    running: deque[Any] = deque()
    while True:
        try:
            plan = decoder.decode(plans.recv_bytes())
        except EOFError:
            return
        running.append(worker.submit(plan))
        if len(running) > overlap:
            worker.wait(running.popleft())


if __name__ == "__main__":
    end_with_parent()
    serve(Connection(int(sys.argv[1])))
