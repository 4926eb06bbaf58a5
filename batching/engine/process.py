"""One engine child from its launch to its end, and the heartbeat that tells a hung one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from batching.engine.channel import FrameBuffer, encode_frame
from batching.engine.messages import (
    Configure,
    Failed,
    FromEngine,
    PoolOutput,
    PoolReady,
    Ready,
    Starting,
    StepOutput,
    ToEngine,
)
from batching.engine.stream import EngineStartError
from batching.worker.pool_protocol import PoolCapabilities
from batching.worker.protocol import Capabilities
from config.child_environment import child_environment
from config.settings import EngineSettings

# The child speaks after every step and idle second. More than that is granted on a CPU, which other
# work may keep from it, and on accelerators, which compile kernels on first use.
SILENCE_SECONDS = 4.0
_DEVICE_SILENCE_SECONDS = {"none": SILENCE_SECONDS, "cpu": 15.0}
_ACCELERATOR_SILENCE_SECONDS = 30.0
_FORECAST_FACTOR = 10.0  # how far off a forecast may be before a step counts as hung
_TICK_SECONDS = 0.25
_END_SECONDS = 1.0  # for the socket or the process to follow when the other has ended
_SOCKET_BUFFER_BYTES = 1 << 22


class EngineProcess:
    """Starts the child `module` and talks to it. Lives once: a restart is another object.

    `receive` is called with every message. Silence is counted in ticks of this process's own
    event loop, so that a stall here (or of the whole machine) is not blamed on the child.
    """

    def __init__(
        self, settings: EngineSettings, module: str, receive: Callable[[FromEngine], None]
    ) -> None:
        self._settings = settings
        self._module = module
        self._receive = receive
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.Transport | None = None
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[Capabilities | PoolCapabilities] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._last_words: str | None = None
        self.killed = False  # after `watch`: a SIGKILL that was not ours ended the child
        self._silence = 0.0  # seconds since the last message
        self._patience = SILENCE_SECONDS
        self._announced: dict[int, float] = {}  # steps under way to the silence they may cause

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return None if self._process is None else self._process.pid

    async def start(self, timeout: float | None = None) -> Capabilities | PoolCapabilities:
        """Launch and wait until the child serves. Raises `EngineStartError`; nothing is left."""
        try:
            await self._launch()
            self.send(Configure(self._settings.model_dump_json().encode()))
            async with asyncio.timeout(timeout):
                capabilities = await self._ready
        except TimeoutError as error:
            await self.kill()
            raise EngineStartError(f"the engine did not start in {timeout:.0f} s") from error
        except OSError as error:  # no memory, processes or descriptors: there may be some later
            await self.kill()
            raise EngineStartError(f"the engine cannot be launched: {error}") from error
        except BaseException:
            await self.kill()
            raise
        self._patience = _DEVICE_SILENCE_SECONDS.get(
            capabilities.device, _ACCELERATOR_SILENCE_SECONDS
        )
        self._silence = 0.0
        return capabilities

    async def _launch(self) -> None:
        """Start the child and connect to it. Raises `OSError`."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                for end in (ours, theirs):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", self._module, str(theirs.fileno())),
                    pass_fds=(theirs.fileno(),),
                    env=child_environment(self._settings.threads),
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,  # a terminal's signals reach only the front end
                )
            loop = asyncio.get_running_loop()
            self._transport, _ = await loop.create_connection(lambda: _Link(self), sock=ours)
        except BaseException:
            ours.close()
            raise

    def send(self, message: ToEngine) -> None:
        """Send a message; if the child is gone it is dropped, and `watch` will tell."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    async def watch(self) -> str:
        """Wait until the child has ended, ending it if it hangs. Returns why, for people."""
        hung = None
        while not self._ended.done():
            await asyncio.wait({self._ended}, timeout=_TICK_SECONDS)
            self._silence += _TICK_SECONDS
            patience = max(self._announced.values(), default=self._patience)
            if self._silence > SILENCE_SECONDS and self._is_stopped():
                patience = SILENCE_SECONDS  # whatever it announced
            if self._silence > patience:
                hung = f"the engine hung: no word from it for {self._silence:.0f} s"
                break
        if hung is None:
            await self._wait_for_exit()
            self.killed = self._process is not None and self._process.returncode == -signal.SIGKILL
        await self.kill()
        return hung or self._last_words or self._describe_exit()

    async def kill(self) -> None:
        """End the child at once. Idempotent; afterwards no message comes."""
        self.end_now()
        if self._process is not None:
            await self._process.wait()
        if self._transport is not None:
            await asyncio.wait({self._ended}, timeout=_END_SECONDS)  # what it said last
            self._transport.abort()
            await self._ended

    def end_now(self) -> None:
        """Send a SIGKILL to the child and all its children, if it has not ended."""
        if self._process is not None and self._process.returncode is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)  # it leads a group of its own
            except ProcessLookupError:  # it ended, and nobody has waited for it yet
                pass

    async def close(self, grace: float) -> None:
        """Let the child end by itself within `grace` seconds, then kill it."""
        if self._transport is not None:
            self._transport.close()
        await self._wait_for_exit(grace)
        await self.kill()

    async def _wait_for_exit(self, seconds: float = _END_SECONDS) -> None:
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), seconds)
            except TimeoutError:
                pass

    def _is_stopped(self) -> bool:
        """Whether the child was sent a SIGSTOP. Only Linux knows; elsewhere it is just silent."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] == "T"

    def _describe_exit(self) -> str:
        code = None if self._process is None else self._process.returncode
        if code is None or code >= 0:
            return f"the engine process ended unexpectedly with status {code}"
        return f"the engine process was killed by {signal.Signals(-code).name}"

    def received(self, message: FromEngine) -> None:
        """Handle one message of the child (called by the link)."""
        self._silence = 0.0
        match message:
            case Ready() | PoolReady():
                if not self._ready.done():
                    self._ready.set_result(message.capabilities)
            case Failed():
                self._last_words = message.message
            case Starting():
                patience = max(self._patience, _FORECAST_FACTOR * message.seconds)
                if not message.familiar:
                    patience = max(patience, self._settings.step_timeout_s)
                self._announced[message.step] = patience
            case StepOutput() | PoolOutput() if self._announced:
                done = message.stats.steps
                self._announced = {s: t for s, t in self._announced.items() if s >= done}
        self._receive(message)

    def disconnected(self) -> None:
        """No more messages will come (called by the link)."""
        if not self._ready.done():
            text = self._last_words or "the engine process ended while it was starting"
            self._ready.set_exception(EngineStartError(text))
        if not self._ended.done():
            self._ended.set_result(None)


class _Link(asyncio.Protocol):
    """Turns the child's bytes into messages."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process
        self._frames = FrameBuffer()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            self._process.received(self._decoder.decode(body))

    def connection_lost(self, exc: Exception | None) -> None:
        self._process.disconnected()
