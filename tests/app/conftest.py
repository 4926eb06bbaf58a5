"""A tiny byte-level model folder and an application around the fake engine."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from app.access.keys import KeyRing
from app.application import create_app
from app.flights.recorder import FlightRecorder
from app.http.protocol import HttpProtocol
from app.service import Service
from app.telemetry.metrics import Metrics
from batching.engine.messages import StepOutput
from batching.worker.protocol import Capabilities
from config.settings import ServerSettings
from tests.app.fake_engine import FakeEngine, Script
from tests.app.turn_formats import make_folder

MODEL = "tiny"
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|end|>{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{{ suffix or '' }}"
)
CORPUS = ["hello world, this is a small tokenizer for tests", "naïve café 日本語 emoji 😀 text"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json, tokenizer_config.json with a template, generation_config.json."""
    folder = tmp_path_factory.mktemp("models") / MODEL
    folder.mkdir()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 10, trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 7}))
    return folder


@pytest.fixture(scope="session")
def capabilities(model_folder: Path) -> Capabilities:
    size = Tokenizer.from_file(str(model_folder / "tokenizer.json")).get_vocab_size()
    return Capabilities(
        model=str(model_folder),
        architecture="Fake",
        vocab_size=size,
        max_model_len=256,
        num_blocks=64,
        block_size=16,
        max_sequences=8,
        max_step_tokens=64,
        dtype="float32",
        device="cpu",
        attention="none",
        eos_token_ids=(0,),
    )


class Server:
    """An application in this process, its engine, and a client for it."""

    def __init__(self, service: Service, engine: FakeEngine) -> None:
        self.service = service
        self.engine = engine
        self.keys = KeyRing(service.settings)
        self.app = create_app(service, self.keys)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    def ids(self, text: str) -> list[int]:
        return list(self.service.tokenizer.backend.encode(text, add_special_tokens=False).ids)

    @property
    def prompt_text(self) -> str:
        """The prompt of the engine's last request."""
        ids = self.engine.requests[-1].prompt
        return str(self.service.tokenizer.backend.decode(ids, skip_special_tokens=False))

    def say(self, text: str, *, end: bool = True) -> None:
        """Have the engine answer every request with `text`."""
        tokens = self.ids(text) + ([0] if end else [])
        self.engine.script = lambda request: tokens

    async def post(self, path: str, **fields: Any) -> httpx.Response:
        return await self.http.post(path, json=fields)

    async def ok(self, path: str, **fields: Any) -> dict[str, Any]:
        response = await self.post(path, **fields)
        assert response.status_code == 200, response.text
        return response.json()

    async def events(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The chunks of a stream, checked to end with [DONE]."""
        response = await self.post(path, stream=True, **fields)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return parse_events(response.text)

    async def named_events(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of a stream that has no [DONE], each checked to be named by its type."""
        response = await self.post(path, stream=True, **fields)
        assert response.status_code == 200, response.text
        *frames, rest = response.text.split("\n\n")
        assert rest == ""
        found = []
        for frame in frames:
            name, data = frame.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
        return found


class Live:
    """A server's application on a real socket, while the context lasts."""

    def __init__(self, server: Server, protocol: type[HttpProtocol] = HttpProtocol) -> None:
        config = uvicorn.Config(
            server.app, http=protocol, ws="none", lifespan="off", log_level="critical"
        )
        self._uvicorn = uvicorn.Server(config)
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]

    @property
    def connections(self) -> set[Any]:
        """uvicorn's protocols, one a connection."""
        return self._uvicorn.server_state.connections

    async def __aenter__(self) -> Live:
        self._task = asyncio.create_task(self._uvicorn.serve(sockets=[self.listener]))
        while not self._uvicorn.started:
            await asyncio.sleep(0.005)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._uvicorn.should_exit = True
        await self._task


def parse_events(text: str) -> list[dict[str, Any]]:
    pieces = text.split("\n\n")
    assert pieces[-2:] == ["data: [DONE]", ""]
    assert all(piece.startswith("data: ") for piece in pieces[:-1])
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces[:-2]]


MakeServer = Callable[..., Server]


@pytest.fixture
async def make_server(capabilities: Capabilities) -> AsyncIterator[MakeServer]:
    """Builds a server: `make_server(script=None, **server_settings)`."""
    servers: list[Server] = []

    def make(
        script: Script | None = None, caps: Capabilities = capabilities, **settings: Any
    ) -> Server:
        metrics = Metrics(MODEL)
        flights = FlightRecorder(metrics)

        def on_step(output: StepOutput) -> None:
            metrics.on_step(output)
            flights.on_step(output)

        engine = FakeEngine(caps, script, on_step)
        service = Service.load(ServerSettings(**settings), engine, caps, metrics, flights)
        servers.append(Server(service, engine))
        return servers[-1]

    yield make
    for server in servers:
        server.engine.resume.set()
        await server.http.aclose()
        server.service.responses.close()
        assert server.engine.running == 0
        assert (server.service.admission.requests, server.service.admission.tokens) == (0, 0)
        assert (server.service.backlog._waiting, server.service.backlog._tokens) == ({}, 0)


MakeTurnServer = Callable[..., Server]


@pytest.fixture
def make_turn_server(
    make_server: MakeServer, capabilities: Capabilities, model_folder: Path, tmp_path: Path
) -> MakeTurnServer:
    """Builds a server whose model has another chat template: `make_turn_server(template, …)`."""

    def make(template: str, response_template: Any = None) -> Server:
        folder = make_folder(tmp_path / "turns", model_folder, template, response_template)
        size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
        caps = msgspec.structs.replace(
            capabilities, model=str(folder), vocab_size=size, max_model_len=2048, num_blocks=128
        )
        return make_server(caps=caps)

    return make


@pytest.fixture
def server(make_server: MakeServer) -> Server:
    return make_server()
