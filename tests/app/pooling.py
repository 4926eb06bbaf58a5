"""Pooling models for tests: a word tokenizer, an engine without a process, a server around them."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from app.application import create_app
from app.pooling.metrics import PoolMetrics
from app.pooling.model import PoolModel
from app.served import Served
from app.service import Service
from batching.core.types import EngineStats, PoolRequest, PoolResult
from batching.engine.pool_client import PoolCall, PoolError
from batching.engine.stream import EngineDeadError
from batching.worker.pool_protocol import PoolCapabilities, PoolTask
from config.settings import ServerSettings

LIMIT = 32
WORDS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
VOCABULARY = {word: i for i, word in enumerate(["[CLS]", "[UNK]", "[SEP]", *WORDS])}
CLS, SEP = VOCABULARY["[CLS]"], VOCABULARY["[SEP]"]


def ids(words: str) -> list[int]:
    return [VOCABULARY[word] for word in words.split()]


@pytest.fixture(scope="session")
def pool_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but a tokenizer."""
    folder = tmp_path_factory.mktemp("pool")
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of one-letter words that frames texts and pairs as BERT's does."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    backend.enable_truncation(4)  # as saved by whoever trained: must not count
    backend.save(str(folder / "tokenizer.json"))


def spread(request: PoolRequest) -> list[float]:
    """Four numbers that tell texts apart."""
    tokens = request.tokens
    return [float(sum(tokens)), float(len(tokens)), float(tokens[0]), float(tokens[-1])]


class FakePool:
    """Computes every text in the next turn of the loop, or not at all while `hold` is set."""

    def __init__(self, capabilities: PoolCapabilities, on_batch: Callable[..., None]) -> None:
        self.capabilities = capabilities
        self.stats = EngineStats()
        self.failure: str | None = None
        self.restarts = 0
        self.resumed_streams = 0
        self.hold = False
        self.error: Exception | None = None  # calls end with it
        self.numbers: Callable[[PoolRequest], Sequence[float]] = spread
        self.requests: list[PoolRequest] = []
        self.aborted: list[str] = []
        self.open = 0
        self._on_batch = on_batch

    @property
    def alive(self) -> bool:
        return self.failure is None

    def counts(self) -> tuple[int, int]:
        return 0, self.open

    def submit(self, requests: Sequence[PoolRequest]) -> PoolCall:
        if self.failure is not None:
            raise EngineDeadError(self.failure)
        self.requests += requests
        self.open += len(requests)
        call = PoolCall(requests, self._abort)
        if not self.hold:
            asyncio.get_running_loop().call_soon(self._finish, call)
        return call

    def _finish(self, call: PoolCall) -> None:
        if self.error is not None:
            call.fail(self.error)
            return
        done = []
        for request in call.requests:
            row = array("f", self.numbers(request)[: self.capabilities.size]).tobytes()
            done.append((request, PoolResult(request.id, row, request.arrival, request.arrival)))
            self.open -= 1
        self._on_batch(done, sum(len(request.tokens) for request, _ in done))
        for _, result in done:
            call.finish(result)

    def _abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.open -= 1


class PoolServer:
    """Pooling models, by name, behind one application; maybe beside a generating one."""

    def __init__(
        self,
        folder: Path,
        kinds: dict[str, dict[str, Any]],
        settings: ServerSettings,
        generator: Service | None = None,
    ) -> None:
        self.engines: dict[str, FakePool] = {}
        self.models: dict[str, PoolModel] = {}
        for name, kind in kinds.items():
            capabilities = pool_capabilities(folder, **kind)
            metrics = PoolMetrics(name)
            engine = self.engines[name] = FakePool(capabilities, metrics.on_batch)
            self.models[name] = PoolModel.load(settings, engine, capabilities, metrics)
        self.app = create_app(Served(generator, list(self.models.values())))
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    @property
    def engine(self) -> FakePool:
        """The first model's."""
        return next(iter(self.engines.values()))

    @property
    def tokens(self) -> list[list[int]]:
        """Of every text that the first model's engine was given."""
        return [request.tokens for request in self.engine.requests]

    async def post(self, path: str, **fields: Any) -> httpx.Response:
        return await self.http.post(path, json=fields)

    async def ok(self, path: str, **fields: Any) -> dict[str, Any]:
        response = await self.post(path, **fields)
        assert response.status_code == 200, response.text
        return response.json()


def pool_capabilities(
    folder: Path, task: PoolTask = "embed", size: int = 4, **fields: Any
) -> PoolCapabilities:
    return PoolCapabilities(
        model=str(folder),
        architecture="Fake",
        task=task,
        size=size,
        vocab_size=len(VOCABULARY),
        max_model_len=LIMIT,
        dtype="float32",
        device="cpu",
        pooling="mean",
        runner="packed",
        labels=tuple(f"label {i}" for i in range(size)) if task == "classify" else (),
        **fields,
    )


MakePools = Callable[..., PoolServer]
EMBEDDER: dict[str, Any] = {}
CROSS_ENCODER: dict[str, Any] = {"task": "classify", "size": 1, "activation": "sigmoid"}
CLASSIFIER: dict[str, Any] = {"task": "classify", "size": 3}


@pytest.fixture
async def make_pools(pool_folder: Path) -> AsyncIterator[MakePools]:
    """Builds a server: `make_pools({name: kind}, generator=None, **server_settings)`."""
    servers: list[PoolServer] = []

    def make(
        kinds: dict[str, dict[str, Any]] | None = None,
        generator: Service | None = None,
        **settings: Any,
    ) -> PoolServer:
        kinds = {"embedder": EMBEDDER} if kinds is None else kinds
        servers.append(PoolServer(pool_folder, kinds, ServerSettings(**settings), generator))
        return servers[-1]

    yield make
    for server in servers:
        await server.http.aclose()
        for name, model in server.models.items():
            assert server.engines[name].open == 0
            assert (model.admission.requests, model.admission.tokens) == (0, 0)


__all__ = ["EngineDeadError", "PoolError", "make_pools", "pool_folder"]
