"""Keeps an engine child running for a client: sends what is open, restarts it, continues.

Everything here runs on the event loop of one thread. Requests and aborts made in one iteration of
the loop leave as one message. When the child dies or hangs, another is started and every open
request goes to it; requests submitted meanwhile wait.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, cast

import msgspec

from batching.core.types import EngineStats
from batching.engine.messages import FromEngine, Progress, Starting, ToEngine
from batching.engine.process import EngineProcess
from batching.engine.quarantine import Accusable, Quarantine
from batching.engine.restart_policy import RestartPolicy
from batching.engine.stream import EngineDeadError, EngineStartError
from config.settings import EngineSettings

logger = logging.getLogger(__name__)

_TOTALS = (
    "steps", "forward_seconds", "prompt_tokens", "generation_tokens", "prefix_queries",
    "prefix_hits", "preemptions", "inbox_seconds", "plan_seconds", "submit_seconds",
    "wait_seconds", "commit_seconds", "outbox_seconds", "idle_seconds",
)  # fmt: skip
# A restart finds the model in the page cache and kernels compiled: slower than this is a hang.
_RESTART_TIMEOUT_FACTOR = 5.0
_SHORTEST_RESTART_TIMEOUT = 180.0


class OpenWork(Accusable, Protocol):
    """A request without its end."""

    interrupted: bool  # an engine died with it

    def interrupt(self) -> None:
        """The engine died: the next one gets the request again."""


Work = TypeVar("Work", bound=OpenWork)
Abilities = TypeVar("Abilities")


class SupervisedClient(ABC, Generic[Work, Abilities]):
    """What clients of both kinds of engine share. `child_module` is what the child runs."""

    def __init__(self, settings: EngineSettings, child_module: str) -> None:
        self._settings = settings
        self._child_module = child_module
        self._on_progress: Callable[[Progress], None] | None = None
        self._open: dict[str, Work] = {}
        self._unsent: dict[str, Work] = {}  # of these, those that no engine has
        self._aborts: list[str] = []
        self._flushing = False
        self._quarantine: Quarantine[Work] = Quarantine()
        self._policy = RestartPolicy(settings.restart_limit)
        self._process: EngineProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._restart_timeout = _SHORTEST_RESTART_TIMEOUT
        self._ended: str | None = "the engine was not started"  # no engine, and none to come
        self._totals = EngineStats()  # of the engines that died
        self.failure: str | None = self._ended  # why no engine serves now; None: one does
        self.restarts = 0
        self.resumed_streams = 0
        self.stats = EngineStats()
        self.capabilities: Abilities | None = None

    # -- what each kind of client does its own way -----------------------------------------------

    @abstractmethod
    def _message(self, requests: list[Work], aborts: list[str]) -> ToEngine:
        """What tells the engine of new requests, now sent, and of those nobody waits for."""

    @abstractmethod
    def _deliver(self, message: FromEngine) -> None:
        """Handle a message that brings results."""

    @abstractmethod
    def _condemn(self, request: Work, error: str) -> None:
        """End a request that crashed the engine repeatedly."""

    @abstractmethod
    def _abandon(self, request: Work, error: EngineDeadError) -> None:
        """End a request because there is no engine."""

    # -- life ------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """An engine serves now."""
        return self.failure is None

    @property
    def pid(self) -> int | None:
        """The process id of the present or last engine child."""
        return None if self._process is None else self._process.pid

    async def start(self, on_progress: Callable[[Progress], None] | None = None) -> Abilities:
        """Launch the child and wait until it serves. Raises `EngineStartError`."""
        self._on_progress = on_progress
        began = time.monotonic()
        self._process = EngineProcess(self._settings, self._child_module, self._receive)
        capabilities = await self._launched()
        seconds = time.monotonic() - began
        self._restart_timeout = max(_SHORTEST_RESTART_TIMEOUT, _RESTART_TIMEOUT_FACTOR * seconds)
        self.failure = self._ended = None
        self._supervisor = asyncio.create_task(self._supervise())
        return capabilities

    async def close(self, grace: float = 0.0) -> None:
        """End the child; open requests fail. With `grace`, wait that long for them first."""
        deadline = time.monotonic() + grace
        while self._open and self._ended is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        self._give_up("the engine was shut down")
        if self._process is not None:
            await self._process.close(grace=5.0)

    def kill(self) -> None:
        """End the child at once, whatever it does."""
        if self._process is not None:
            self._process.end_now()

    async def given_up(self) -> None:
        """Until no engine serves, nor will. Only after `start`."""
        assert self._supervisor is not None
        await asyncio.wait({self._supervisor})

    # -- to the engine ---------------------------------------------------------------------------

    def _take_up(self, request: Work) -> None:
        """Queue a new request. Raises `EngineDeadError` if there is no engine, nor will be."""
        if self._ended is not None:
            raise EngineDeadError(self._ended)
        self._open[request.id] = self._unsent[request.id] = request
        self._schedule_flush()

    def abort(self, request_id: str) -> None:
        """Stop a request and free what it holds. Unknown ids are ignored."""
        request = self._open.get(request_id)
        if request is None:
            return
        if request.sent:
            self._aborts.append(request_id)
        self._forget(request)
        self._schedule_flush()

    def _schedule_flush(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if not self.alive or self._process is None:
            return  # the next engine gets everything
        requests = []
        for request in self._quarantine.may_go(list(self._unsent.values())):
            del self._unsent[request.id]
            requests.append(request)
            self.resumed_streams += request.interrupted
        if requests or self._aborts:
            self._process.send(self._message(requests, self._aborts))
            self._aborts = []

    # -- from the engine -------------------------------------------------------------------------

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Starting():
                for request_id in message.admitted:
                    if request_id in self._open:
                        self._open[request_id].admitted = True
            case Progress():
                if self._on_progress is not None:
                    self._on_progress(message)
            case _:
                self._deliver(message)

    def _forget(self, request: Work) -> None:
        del self._open[request.id]
        self._unsent.pop(request.id, None)
        if self._quarantine.forget(request):
            self._schedule_flush()

    def _sum_totals(self, stats: EngineStats) -> EngineStats:
        """Totals that go on where those of the engines that died stood."""
        if not self.restarts:
            return stats
        sums = {name: getattr(self._totals, name) + getattr(stats, name) for name in _TOTALS}
        return msgspec.structs.replace(stats, **sums)

    # -- when it dies ----------------------------------------------------------------------------

    async def _supervise(self) -> None:
        try:
            while self._process is not None:
                reason = await self._process.watch()
                died = time.monotonic()
                explained = self._bury(reason, self._process.killed, died)
                await self._restart(reason, explained, died)
        except EngineDeadError as error:
            logger.critical("%s", error)
            self._give_up(str(error))
        except Exception as error:
            logger.exception("the engine's supervisor failed")
            self._give_up(f"the engine's supervisor failed: {error}")

    def _bury(self, reason: str, killed: bool, died: float) -> bool:
        """Take back what the dead engine had, and fail its killer. Returns whether one is known."""
        logger.error("%s; %d requests are open", reason, len(self._open))
        self.failure = f"restarting: {reason}"
        sent = [request for request in self._open.values() if request.sent]
        culprit = self._quarantine.engine_died(sent, killed, died)
        for request in self._open.values():
            request.interrupt()
        self._unsent = dict(self._open)
        self._aborts = []
        if culprit is not None:
            self._forget(culprit)
            self._policy.excuse(culprit.deaths)
            for request in self._open.values():  # they need not prove themselves for these
                request.crashes.difference_update(culprit.deaths)
            logger.error("request %s crashed the engine repeatedly", culprit.id)
            self._condemn(culprit, f"the request crashed the engine repeatedly ({reason})")
        self._totals = msgspec.structs.replace(
            self.stats, running=0, waiting=len(self._open), blocks_used=0
        )
        self.stats = self._totals
        return culprit is not None

    async def _restart(self, reason: str, explained: bool, died: float) -> None:
        """Start another engine. Raises `EngineDeadError` if that fails too often.

        `explained`: who killed the last one is gone.
        """
        delay = self._policy.delay(died, counts=not explained)
        while delay is not None:
            await asyncio.sleep(delay)
            self.restarts += 1
            logger.warning("starting the engine again (restart %d)", self.restarts)
            self._process = EngineProcess(self._settings, self._child_module, self._receive)
            try:
                await self._launched(self._restart_timeout)
            except EngineStartError as error:
                reason = str(error)
                self.failure = f"restarting: {reason}"
                logger.error("%s", reason)
                delay = self._policy.delay(time.monotonic())
                continue
            self.failure = None
            logger.info("the engine serves again; %d requests go to it", len(self._open))
            self._schedule_flush()
            return
        raise EngineDeadError(f"the engine died too often, the last time because: {reason}")

    async def _launched(self, timeout: float | None = None) -> Abilities:
        assert self._process is not None
        self.capabilities = cast(Abilities, await self._process.start(timeout))
        return self.capabilities

    def _give_up(self, reason: str) -> None:
        """Fail everything that is open and all that will come."""
        if self._ended is not None:
            return
        self.failure = self._ended = reason
        requests, self._open, self._unsent = self._open, {}, {}
        for request in requests.values():
            self._abandon(request, EngineDeadError(reason))
