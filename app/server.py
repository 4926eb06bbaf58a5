"""The HTTP server: routes, and the life of the process around them."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
import uvloop
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from app.access.keys import KeyFileError, KeyRing
from app.engines import Engines
from app.http.body import Bodies
from app.http.errors import install_error_handlers
from app.http.protocol import HttpProtocol
from app.http.tls import TlsError, tls_options
from app.inputs.template import renderer
from app.inputs.tokenizer import TokenizerError
from app.middleware import ApiKeys, Draining, RequestId
from app.responses.store import ResponseStoreError
from app.routes import add_routes
from app.served import Served
from app.service import Service
from app.shutdown import Signals, drain
from app.startup_log import log_ready
from app.telemetry.accounts import Accounts
from batching.engine.client import EngineStartError
from config.settings import EngineSettings, ServerSettings

if TYPE_CHECKING:
    from app.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

# Longer than clients and proxies keep idle connections, so that it is they who close them: a server
# that does so may have a request under way to it.
_KEEP_ALIVE_SECONDS = 75
_CLOSE_SECONDS = 1  # for connections to close when no request is open any more
_OPEN_FILES = 65536
# Bytes of an answer that the system takes before they can be sent, rather than megabytes: so that
# it is noticed early that a client does not read, and its events merge.
_UNSENT_BYTES = 131072


class MissingExtraError(RuntimeError):
    """A setting needs a package that is not installed; the message says how to get it."""


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


def serve(
    engine: EngineSettings, server: ServerSettings, pools: Mapping[str, EngineSettings]
) -> int:
    """Start the engines, serve until told to stop, drain. Returns the exit status (`shutdown`).

    `pools` has the pooling models by public name; `engine` may be one of them. Every model is a
    local folder.
    """
    raise_open_files_limit()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(engine, server, pools))


async def _serve(
    engine: EngineSettings, settings: ServerSettings, pools: Mapping[str, EngineSettings]
) -> int:
    try:
        keys = KeyRing(settings)
        tls = tls_options(settings)
        listener = _bind(settings.host, settings.port)
    except (KeyFileError, TlsError) as error:
        logger.error("%s", error)
        return 1
    except OSError as error:
        logger.error("cannot listen on %s port %d: %s", settings.host, settings.port, error)
        return 1
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, keys.reload)
    name = settings.served_model_name or Path(engine.model).name
    engines = Engines()
    signals = Signals(engines.kill)
    tracing = None
    try:
        tracing = load_tracing(settings.otlp_endpoint)
        slow_import = asyncio.create_task(asyncio.to_thread(renderer))  # meanwhile
        generator = None if name in pools else with_policy(engine, settings)
        served = await signals.unless_told(engines.start(settings, name, generator, pools))
        if served is None:
            return signals.status
        await slow_import
        if tracing is not None:
            served.listeners.append(tracing.ended)
        try:
            app = create_app(served, keys)
            return await _serve_http(app, tls, served, engines, listener, signals)
        finally:
            if served.generator is not None:
                served.generator.responses.close()
    except (EngineStartError, TokenizerError, ResponseStoreError, MissingExtraError) as error:
        logger.error("cannot start: %s", error)
        return 1
    finally:
        await engines.close()
        listener.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)


def load_tracing(endpoint: str) -> Tracing | None:
    """What sends traces to `endpoint`, if there is one. Raises `MissingExtraError`."""
    if not endpoint:
        return None
    try:
        from app.telemetry.tracing import Tracing
    except ImportError as error:
        message = f"otlp_endpoint needs pip install 'slipstream[otel]' ({error})"
        raise MissingExtraError(message) from error
    return Tracing(endpoint)


def with_policy(engine: EngineSettings, settings: ServerSettings) -> EngineSettings:
    """The engine's settings with a policy instead of "auto"."""
    if engine.policy != "auto":
        return engine
    several = len(settings.api_keys) > 1 or settings.api_key_file
    return engine.model_copy(update={"policy": "fair" if several else "fcfs"})


def raise_open_files_limit() -> None:
    """Allow as many connections as we may: each is a file, and shells allow 1024 of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet: a port in use is known before a model is loaded.

    Raises `OSError`.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


async def _serve_http(
    app: FastAPI,
    tls: dict[str, Any],
    served: Served,
    engines: Engines,
    listener: socket.socket,
    signals: Signals,
) -> int:
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
    host, port = listener.getsockname()[:2]
    scheme = "https" if tls else "http"
    url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    log_ready({model.name: model.capabilities for model in served.models}, url)
    server = _HttpServer(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    told, dead = asyncio.create_task(signals.wait()), asyncio.create_task(engines.given_up())
    await asyncio.wait({serving, told, dead}, return_when=asyncio.FIRST_COMPLETED)
    served.draining = True  # still accepting connections, so that /health can say so
    await drain(server.server_state.tasks, served.settings.drain_seconds)
    server.should_exit = True
    await serving
    for task in (told, dead):
        task.cancel()
    return 1 if dead.done() else 0


class _HttpServer(uvicorn.Server):
    """Leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
