"""An engine for tests: scripted or derived tokens, no process, no clock to wait for."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence

from batching.core.types import (
    EngineStats,
    FinishReason,
    Request,
    TokenEvent,
    TokenLogprobs,
)
from batching.engine.client import EngineDeadError, RequestStream
from batching.engine.messages import StepOutput
from batching.worker.protocol import Capabilities

Script = Callable[[Request], Sequence[int]]


class FakeEngine:
    """Gives every request the tokens of `script`, one per step, each step one loop turn.

    While `resume` is clear nothing is generated. `abort`ed ids are recorded. `die` fails all
    streams, as a dead child does. Like the real one it ends at stop tokens and `max_tokens`.
    """

    def __init__(
        self,
        capabilities: Capabilities,
        script: Script | None = None,
        on_step: Callable[[StepOutput], None] | None = None,
        tokens_per_step: int = 1,
    ) -> None:
        self.capabilities = capabilities
        self.stats = EngineStats()
        self.failure: str | None = None
        self.restarts = 0
        self.resumed_streams = 0
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.script = script or derived_tokens(capabilities.vocab_size)
        self.on_step = on_step
        self.tokens_per_step = tokens_per_step
        self.error: str | None = None  # requests end with this error
        self.die_after: int | None = None  # tokens of a request before the engine dies
        self.free_tokens = 0  # tokens of each request that need no `resume`
        self.resume = asyncio.Event()
        self.resume.set()
        self.streams: dict[str, RequestStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, request: Request) -> RequestStream:
        if not self.alive:
            raise EngineDeadError("the engine is not running")
        self.requests.append(request)
        stream = self.streams[request.id] = RequestStream(request, self._abort)
        task = asyncio.create_task(self._generate(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    @property
    def alive(self) -> bool:
        return self.failure is None

    @property
    def running(self) -> int:
        return len(self.streams)

    def die(self) -> None:
        self.failure = "the engine process ended unexpectedly"
        for stream in self.streams.values():
            stream.fail(EngineDeadError("the engine process ended unexpectedly"))
        self.streams.clear()

    def expire(self) -> None:
        """End all requests as the scheduler ends those whose time is over."""
        for id in list(self.streams):
            self._push(TokenEvent(id, finish=FinishReason.EXPIRED))

    def _abort(self, request_id: str) -> None:
        if self.streams.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    async def _generate(self, request: Request) -> None:
        params = request.params
        tokens = list(self.script(request))[: params.max_tokens]
        done = 0
        while request.id in self.streams:
            if done >= self.free_tokens:
                await self.resume.wait()
            await asyncio.sleep(0)
            if self.die_after is not None and done >= self.die_after:
                self.die()
            elif self.error is not None:
                self._push(TokenEvent(request.id, finish=FinishReason.ERROR, error=self.error))
            else:
                batch = tokens[done : done + self.tokens_per_step]
                done += self._emit(request, batch, done, len(tokens))

    def _emit(self, request: Request, batch: list[int], done: int, total: int) -> int:
        params, finish = request.params, None
        for i, token in enumerate(batch):
            if token in params.stop_token_ids and done + i + 1 > params.min_tokens:
                batch, finish = batch[: i + 1], FinishReason.STOP
                break
        if finish is None and done + len(batch) >= total:
            finish = FinishReason.LENGTH
        width = self.capabilities.vocab_size
        logprobs = (
            ()
            if params.logprobs is None
            else tuple(fake_logprobs(token, params.logprobs, width) for token in batch)
        )
        prompt: tuple[TokenLogprobs, ...] = ()
        if params.prompt_logprobs is not None and done == 0:
            prompt = tuple(
                fake_logprobs(token, params.prompt_logprobs, width) for token in request.prompt[1:]
            )
        first = done == 0
        self._push(
            TokenEvent(
                request.id,
                tokens=tuple(batch),
                logprobs=logprobs,
                prompt_logprobs=prompt,
                cached_tokens=0 if first else None,
                finish=finish,
            )
        )
        return len(batch)

    def _push(self, event: TokenEvent) -> None:
        stream = self.streams.get(event.id)
        if stream is None:
            return
        if event.finish is not None:
            del self.streams[event.id]
        if self.on_step is not None:
            self.on_step(StepOutput([event], self.stats))
        stream.push(event)


def derived_tokens(vocab_size: int) -> Script:
    """Tokens that depend on prompt, seed and position, as sampling does."""

    def script(request: Request) -> list[int]:
        salt = "greedy" if request.params.temperature == 0 else str(request.params.seed)
        return [
            zlib.crc32(f"{request.prompt}{salt}{i}".encode()) % vocab_size
            for i in range(request.params.max_tokens)
        ]

    return script


def fake_logprobs(token: int, count: int, vocab_size: int) -> TokenLogprobs:
    """A sampled token of rank 3 and `count` likelier or equal ones; one impossible token."""
    top = [((token + 1 + i) % vocab_size, -0.5 * (i + 1)) for i in range(count)]
    if count > 1:
        top[-1] = (top[-1][0], float("-inf"))
    return TokenLogprobs(token, -1.25, 3, tuple(top))
