"""The front end but for its process: what takes half a second to import, and the models' texts.

`server.py` makes it in a thread while the engines start, so nothing here is needed before.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from app.access.keys import KeyFileError, KeyRing
from app.engines import Engines
from app.flights.recorder import FlightRecorder
from app.http.body import Bodies
from app.http.errors import install_error_handlers
from app.http.protocol import HttpProtocol
from app.inputs.template import renderer
from app.inputs.text_side import TextSide
from app.inputs.tokenizer import TokenizerError
from app.middleware import ApiKeys, Draining, RequestId
from app.pooling.metrics import PoolMetrics
from app.pooling.model import PoolModel
from app.pooling.tokenizer import PoolTokenizer
from app.responses.store import ResponseStoreError
from app.routes import add_routes
from app.served import Served
from app.service import Service
from app.shutdown import drain
from app.start_error import StartError
from app.telemetry.accounts import Accounts
from app.telemetry.metrics import Metrics
from batching.engine.client import EngineClient
from batching.engine.messages import StepOutput
from batching.engine.pool_client import PoolClient
from config.settings import EngineSettings, ServerSettings

# Longer than clients and proxies keep idle connections, so that it is they who close them: a server
# that does so may have a request under way to it.
_KEEP_ALIVE_SECONDS = 75
_CLOSE_SECONDS = 1  # for connections to close when no request is open any more


class FrontEnd:
    """Keys and texts, and when the engines serve, the models and the application around them."""

    def __init__(
        self,
        settings: ServerSettings,
        name: str,
        generator: EngineSettings | None,
        pools: Mapping[str, EngineSettings],
    ) -> None:
        """`name` is the generator's. Raises `StartError`."""
        self._settings, self._name, self._generator = settings, name, generator
        with _explained():
            self.keys = KeyRing(settings)
            self._text = None if generator is None else TextSide.load(Path(generator.model))
            self._tokenizers = {
                pool: PoolTokenizer.load(Path(engine.model)) for pool, engine in pools.items()
            }
        renderer()  # imports: no request is to wait for that

    def serve(self, engines: Engines) -> Served:
        """The models around engines that serve. Raises `StartError`."""
        with _explained():
            pools = [self._pool(name, client) for name, client in engines.pools.items()]
            service = None if engines.generator is None else self._service(engines.generator)
        return Served(service, pools)

    def listen(self, served: Served, tls: dict[str, Any], listener: socket.socket) -> HttpServer:
        """Serve the models' application on a socket."""
        return HttpServer(create_app(served, self.keys), tls, listener)

    def _service(self, client: EngineClient) -> Service:
        metrics = Metrics(self._name)
        flights = FlightRecorder(metrics)

        def on_step(output: StepOutput) -> None:
            metrics.on_step(output)
            flights.on_step(output)

        client.on_step = on_step
        assert client.capabilities is not None
        assert self._generator is not None
        return Service.load(
            self._settings,
            client,
            client.capabilities,
            metrics,
            flights,
            self._generator.policy,
            self._text,
        )

    def _pool(self, name: str, client: PoolClient) -> PoolModel:
        metrics = PoolMetrics(name)
        client.on_batch = metrics.on_batch
        assert client.capabilities is not None
        return PoolModel.load(
            self._settings, client, client.capabilities, metrics, self._tokenizers[name]
        )


@contextmanager
def _explained() -> Iterator[None]:
    """Turns what may be wrong with files into a `StartError`."""
    try:
        yield
    except (KeyFileError, TokenizerError, ResponseStoreError) as error:
        raise StartError(str(error)) from error


def create_app(served: Served | Service, keys: KeyRing | None = None) -> FastAPI:
    """The ASGI application of the served models, or of a single one that generates.

    `keys` are by default those of the settings. Raises `KeyFileError`.
    """
    if isinstance(served, Service):
        served = Served(served)
    middleware = [Middleware(RequestId), Middleware(Accounts, served=served)]
    if origins := served.settings.cors_origins:
        # Before the keys are asked for: a browser asks first whether it may, and without one.
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=origins,
                allow_methods=("*",),
                allow_headers=("*",),
                expose_headers=("*",),
            )
        )
    keys = keys or KeyRing(served.settings)
    middleware.append(Middleware(ApiKeys, keys=keys, origins=served.settings.cors_origins))
    middleware.append(Middleware(Draining, served=served))
    app = FastAPI(title="Slipstream", middleware=middleware, docs_url=None, redoc_url=None)
    app.state.bodies = Bodies(served.settings.max_body_bytes)
    install_error_handlers(app)
    add_routes(app, served)
    return app


class HttpServer:
    """Serves the application on a socket, from its making until `close`."""

    def __init__(self, app: FastAPI, tls: dict[str, Any], listener: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="warning",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
            **tls,
        )
        self._server = _Uvicorn(config)
        self.serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def close(self, seconds: float) -> None:
        """Finish open requests within that time, then end."""
        await drain(self._server.server_state.tasks, seconds)
        self._server.should_exit = True
        await self.serving


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
