"""One served pooling model: its engine, text side, limits and counters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import numpy as np
import numpy.typing as npt
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from app.access.admission import Admission
from app.access.terms import TIMEOUT_HEADER, end_by, expired, key_of
from app.engine_protocol import PoolEngine
from app.http.errors import ApiError, engine_error
from app.offload import prepare
from app.pooling.inputs import Encoded, Encoder
from app.pooling.metrics import PoolMetrics
from app.pooling.tokenizer import PoolTokenizer
from app.schemas.pooling import InputFields
from app.telemetry.accounts import Pooled
from batching.core.types import PoolRequest, PoolResult
from batching.engine.pool_client import PoolCall, PoolError
from batching.worker.pool_protocol import PoolCapabilities
from config.settings import ServerSettings

Numbers = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PoolModel:
    """Built once, when the engine is ready. Its queue is bounded in calls and in tokens."""

    settings: ServerSettings
    engine: PoolEngine
    name: str
    tokenizer: PoolTokenizer
    metrics: PoolMetrics
    admission: Admission
    created: int = field(default_factory=lambda: int(time.time()))
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def load(
        cls,
        settings: ServerSettings,
        engine: PoolEngine,
        capabilities: PoolCapabilities,
        metrics: PoolMetrics,
        tokenizer: PoolTokenizer | None = None,
    ) -> PoolModel:
        """Read the model folder's tokenizer, unless it was. Raises `TokenizerError`."""
        admission = Admission(settings.max_queued_requests, settings.max_queued_tokens)
        metrics.serve(engine, admission, capabilities)
        tokenizer = tokenizer or PoolTokenizer.load(Path(capabilities.model))
        return cls(settings, engine, metrics.model_name, tokenizer, metrics, admission)

    @property
    def capabilities(self) -> PoolCapabilities:
        """The engine's, or the last one's while it restarts."""
        assert self.engine.capabilities is not None
        return self.engine.capabilities

    @property
    def abilities(self) -> str:
        """What it is good for, for people."""
        if self.capabilities.task == "embed":
            return "makes embeddings (/v1/embeddings, /score, /rerank)"
        if self.capabilities.size == 1:
            return "scores pairs of texts (/score, /rerank, /classify)"
        return "classifies texts (/classify)"

    async def compute_input(
        self, fields: InputFields, request: Request, body_bytes: int
    ) -> tuple[list[Encoded], Numbers]:
        """What `input` is to the model, and its numbers. Raises as `compute`."""
        encoder = Encoder.of(self.tokenizer, self.capabilities, fields)
        texts = await prepare(
            lambda: encoder.inputs(fields.input, fields.add_special_tokens), body_bytes
        )
        return texts, await self.compute(texts, request)

    async def compute(self, texts: Sequence[Encoded], request: Request) -> Numbers:
        """Float32 [texts, size]. Whatever happens, nothing stays submitted.

        Raises `ApiError` (no room, too late, or the engine failed), `EngineDeadError`, and
        `ClientDisconnect` when nobody listens any more.
        """
        end = end_by(request)
        tokens = sum(len(text.ids) for text in texts)
        self.admission.admit([tokens], self.engine.stats)
        call = watcher = timer = None
        reason = "error"
        try:
            key_of(request).quota.take_prompt(tokens)
            call = self.engine.submit(self._requests(texts))
            watcher = asyncio.create_task(_watch(call, request.receive))
            if end is not None:
                delay, error = max(end - self.clock(), 0.0), expired(TIMEOUT_HEADER)
                timer = asyncio.get_running_loop().call_later(delay, call.fail, error)
            results = await call.results()
            reason = "stop"
            self.metrics.prompt_tokens += tokens
            request.state.pooled = Pooled(
                self.name,
                len(texts),
                tokens,
                call.requests[0].arrival,
                min(result.scheduled for result in results),
                max(result.finished for result in results),
            )
            return self._numbers(results)
        except PoolError as error:
            raise engine_error(str(error)) from error
        except asyncio.CancelledError:
            reason = "abort"
            if watcher is not None and watcher.done():
                raise ClientDisconnect from None
            # Nobody else cancels: the time to drain is over.
            message = "the server is shutting down"
            raise ApiError(message, status=503, code="shutting_down") from None
        finally:
            if watcher is not None:
                watcher.cancel()
            if timer is not None:
                timer.cancel()
            if call is not None:
                call.cancel()
            self.metrics.ended([len(text.ids) for text in texts], reason)
            self.admission.release(tokens)

    def _requests(self, texts: Sequence[Encoded]) -> list[PoolRequest]:
        name, now = uuid4().hex, self.clock()
        return [
            PoolRequest(f"{name}-{i}", name, text.ids, now, text.second)
            for i, text in enumerate(texts)
        ]

    def _numbers(self, results: Sequence[PoolResult]) -> Numbers:
        joined = b"".join(result.values for result in results)
        numbers = np.frombuffer(joined, "<f4").reshape(len(results), self.capabilities.size)
        if not np.isfinite(numbers).all():
            raise engine_error("the model gave numbers that are not finite")
        return numbers


async def _watch(call: PoolCall, receive: Receive) -> None:
    """Drop the call when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    call.cancel()
