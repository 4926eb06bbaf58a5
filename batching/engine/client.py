"""The front end's asyncio handle on the engine: submit requests, read streams, survive crashes.

A step's events arrive as one message, upon which each stream's reader is called once; no task is
woken. When the engine dies, every open request goes to the next with the tokens that its stream
has been given already, so that a stream only sees a pause (see `supervised`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from batching.core.types import FinishReason, Request, TokenEvent
from batching.engine.messages import FromEngine, Progress, StepOutput, Submit
from batching.engine.open_request import OpenRequest
from batching.engine.stream import EngineDeadError, EngineStartError, RequestStream
from batching.engine.supervised import SupervisedClient
from batching.worker.protocol import Capabilities
from config.settings import EngineSettings

__all__ = ["EngineClient", "EngineDeadError", "EngineStartError", "RequestStream"]


class EngineClient(SupervisedClient[OpenRequest, Capabilities]):
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
        super().__init__(settings, child_module)
        self.on_step = on_step
        self._news: list[RequestStream] = []  # whose readers are to be told

    async def start(self, on_progress: Callable[[Progress], None] | None = None) -> Capabilities:
        """Launch the child and wait until it serves. Raises `EngineStartError`.

        Later engines get a KV pool of the same size, whatever memory is free then: what is open
        must fit, and what the front end lets in.
        """
        capabilities = await super().start(on_progress)
        blocks = max(2, capabilities.num_blocks)  # the least that the setting allows
        self._settings = self._settings.model_copy(update={"num_blocks": blocks})
        return capabilities

    def submit(self, request: Request) -> RequestStream:
        """Queue a request. Raises `EngineDeadError` if there is no engine, nor will be."""
        stream = RequestStream(request, self.abort)
        self._take_up(OpenRequest(stream))
        return stream

    def _message(self, requests: list[OpenRequest], aborts: list[str]) -> Submit:
        return Submit([request.to_send() for request in requests], aborts)

    def _deliver(self, message: FromEngine) -> None:
        if not isinstance(message, StepOutput):
            return
        self.stats = self._sum_totals(message.stats)
        news = []
        if message.events and not self._news:
            asyncio.get_running_loop().call_soon(self._tell)
        for event in message.events:
            request = self._open.get(event.id)
            if request is None:
                news.append(event)  # aborted meanwhile
                continue
            event = request.take(event)
            news.append(event)
            request.stream.add(event)
            self._news.append(request.stream)
            if event.finish is not None:
                self._forget(request)
            elif request.deaths and self._quarantine.acquit(request):
                self._schedule_flush()
        if self.on_step is not None:
            self.on_step(StepOutput(news, self.stats, message.step))

    def _tell(self) -> None:
        """Call the readers: what several messages brought in one read has merged."""
        streams, self._news = self._news, []
        for stream in streams:
            stream.on_news()

    def _condemn(self, request: OpenRequest, error: str) -> None:
        request.stream.push(TokenEvent(request.id, finish=FinishReason.ERROR, error=error))

    def _abandon(self, request: OpenRequest, error: EngineDeadError) -> None:
        request.stream.fail(error)
