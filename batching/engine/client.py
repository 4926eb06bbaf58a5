"""The front end's asyncio handle on the engine: submit requests, read streams, survive crashes.

Everything here runs on the event loop of one thread. Requests and aborts made in one iteration
of the loop leave as one message; a step's events arrive as one message and wake each stream once.

The client supervises the engine child. When it dies or hangs, another is started, and every open
request goes to it with the tokens that its stream has been given already; so a stream only sees a
pause. Requests submitted meanwhile wait.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from batching.core.types import EngineStats, FinishReason, Request, TokenEvent
from batching.engine.messages import FromEngine, Progress, Starting, StepOutput, Submit
from batching.engine.open_request import OpenRequest
from batching.engine.process import EngineProcess
from batching.engine.quarantine import Quarantine
from batching.engine.restart_policy import RestartPolicy
from batching.engine.stream import EngineDeadError, EngineStartError, RequestStream
from batching.worker.protocol import Capabilities
from config.settings import EngineSettings

__all__ = ["EngineClient", "EngineDeadError", "EngineStartError", "RequestStream"]

logger = logging.getLogger(__name__)

_TOTALS = (
    "steps", "forward_seconds", "prompt_tokens", "generation_tokens", "prefix_queries",
    "prefix_hits", "preemptions",
)  # fmt: skip
# A restart finds the model in the page cache and kernels compiled: slower than this is a hang.
_RESTART_TIMEOUT_FACTOR = 5.0
_SHORTEST_RESTART_TIMEOUT = 180.0


class EngineClient:
    """Keeps one engine child running and talks to it.

    `on_step` is called with every step's news, with totals that go on over restarts.
    `child_module` is what the child runs; it must speak as `batching.engine.child` does.
    """

    def __init__(
        self,
        settings: EngineSettings,
        on_step: Callable[[StepOutput], None] | None = None,
        *,
        child_module: str = "batching.engine.child",
    ) -> None:
        self._settings = settings
        self._on_step = on_step
        self._child_module = child_module
        self._on_progress: Callable[[Progress], None] | None = None
        self._open: dict[str, OpenRequest] = {}
        self._unsent: dict[str, OpenRequest] = {}  # of these, those that no engine has
        self._aborts: list[str] = []
        self._flushing = False
        self._quarantine = Quarantine()
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
        self.capabilities: Capabilities | None = None

    @property
    def alive(self) -> bool:
        """An engine serves now."""
        return self.failure is None

    @property
    def pid(self) -> int | None:
        """The process id of the present or last engine child."""
        return None if self._process is None else self._process.pid

    async def start(self, on_progress: Callable[[Progress], None] | None = None) -> Capabilities:
        """Launch the child and wait until it serves. Raises `EngineStartError`."""
        self._on_progress = on_progress
        began = time.monotonic()
        self._process = EngineProcess(self._settings, self._child_module, self._receive)
        self.capabilities = await self._process.start()
        seconds = time.monotonic() - began
        self._restart_timeout = max(_SHORTEST_RESTART_TIMEOUT, _RESTART_TIMEOUT_FACTOR * seconds)
        self.failure = self._ended = None
        self._supervisor = asyncio.create_task(self._supervise())
        return self.capabilities

    def submit(self, request: Request) -> RequestStream:
        """Queue a request. Raises `EngineDeadError` if there is no engine, nor will be."""
        if self._ended is not None:
            raise EngineDeadError(self._ended)
        stream = RequestStream(request, self.abort)
        self._open[request.id] = self._unsent[request.id] = OpenRequest(stream)
        self._schedule_flush()
        return stream

    def abort(self, request_id: str) -> None:
        """Stop a request and free what it holds. Unknown ids are ignored."""
        request = self._open.get(request_id)
        if request is None:
            return
        if request.sent:
            self._aborts.append(request_id)
        self._forget(request)
        self._schedule_flush()

    async def close(self, grace: float = 0.0) -> None:
        """End the child; open streams fail. With `grace`, wait that long for them first."""
        deadline = time.monotonic() + grace
        while self._open and self._ended is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
        self._give_up("the engine was shut down")
        if self._process is not None:
            await self._process.close(grace=5.0)

    # -- to the engine ---------------------------------------------------------------------------

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
            requests.append(request.to_send())
            self.resumed_streams += request.interrupted
        if requests or self._aborts:
            self._process.send(Submit(requests, self._aborts))
            self._aborts = []

    # -- from the engine -------------------------------------------------------------------------

    def _receive(self, message: FromEngine) -> None:
        match message:
            case StepOutput():
                self._deliver(message)
            case Starting():
                for request_id in message.admitted:
                    if request_id in self._open:
                        self._open[request_id].admitted = True
            case Progress():
                if self._on_progress is not None:
                    self._on_progress(message)

    def _deliver(self, output: StepOutput) -> None:
        self.stats = self._sum_totals(output.stats) if self.restarts else output.stats
        news = []
        for event in output.events:
            request = self._open.get(event.id)
            if request is None:
                news.append(event)  # aborted meanwhile
                continue
            event = request.take(event)
            news.append(event)
            if event.finish is not None:
                self._forget(request)
            elif request.strikes and self._quarantine.acquit(request):
                self._schedule_flush()
            request.stream.push(event)
        if self._on_step is not None:
            self._on_step(StepOutput(news, self.stats))

    def _forget(self, request: OpenRequest) -> None:
        del self._open[request.id]
        self._unsent.pop(request.id, None)
        if self._quarantine.forget(request):
            self._schedule_flush()

    def _sum_totals(self, stats: EngineStats) -> EngineStats:
        sums = {name: getattr(self._totals, name) + getattr(stats, name) for name in _TOTALS}
        return msgspec.structs.replace(stats, **sums)

    # -- when it dies ----------------------------------------------------------------------------

    async def _supervise(self) -> None:
        try:
            while self._process is not None:
                reason = await self._process.watch()
                self._bury(reason, self._process.killed)
                await self._restart(reason)
        except EngineDeadError as error:
            logger.critical("%s", error)
            self._give_up(str(error))
        except Exception as error:
            logger.exception("the engine's supervisor failed")
            self._give_up(f"the engine's supervisor failed: {error}")

    def _bury(self, reason: str, killed: bool) -> None:
        """Take back what the dead engine had, and fail who killed it, if that is known."""
        logger.error("%s; %d requests are open", reason, len(self._open))
        self.failure = f"restarting: {reason}"
        sent = [request for request in self._open.values() if request.sent]
        culprit = self._quarantine.engine_died(sent, killed)
        for request in self._open.values():
            request.interrupt()
        self._unsent = dict(self._open)
        self._aborts = []
        if culprit is not None:
            self._forget(culprit)
            logger.error("request %s crashed the engine repeatedly", culprit.id)
            error = f"the request crashed the engine repeatedly ({reason})"
            culprit.stream.push(TokenEvent(culprit.id, finish=FinishReason.ERROR, error=error))
        self._totals = msgspec.structs.replace(
            self.stats, running=0, waiting=len(self._open), blocks_used=0
        )
        self.stats = self._totals

    async def _restart(self, reason: str) -> None:
        """Start another engine. Raises `EngineDeadError` if that fails too often."""
        while (delay := self._policy.delay(time.monotonic())) is not None:
            await asyncio.sleep(delay)
            self.restarts += 1
            logger.warning("starting the engine again (restart %d)", self.restarts)
            settings = self._restart_settings()
            self._process = EngineProcess(settings, self._child_module, self._receive)
            try:
                self.capabilities = await self._process.start(self._restart_timeout)
            except EngineStartError as error:
                reason = str(error)
                self.failure = f"restarting: {reason}"
                logger.error("%s", reason)
                continue
            self.failure = None
            logger.info("the engine serves again; %d requests go to it", len(self._open))
            self._schedule_flush()
            return
        raise EngineDeadError(f"the engine died too often, the last time because: {reason}")

    def _restart_settings(self) -> EngineSettings:
        """The same, but the event log of the engine that died is kept: it tells why."""
        if self._settings.event_log is None:
            return self._settings
        name = f"{self._settings.event_log}.{self.restarts}"
        return self._settings.model_copy(update={"event_log": name})

    def _give_up(self, reason: str) -> None:
        """Fail everything that is open and all that will come."""
        if self._ended is not None:
            return
        self.failure = self._ended = reason
        requests, self._open, self._unsent = self._open, {}, {}
        for request in requests.values():
            request.stream.fail(EngineDeadError(reason))
