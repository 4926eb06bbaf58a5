"""The HTTP server: routes, and the life of the process around them."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import uvicorn
import uvloop
from fastapi import FastAPI
from starlette.middleware import Middleware

from app.engines import Engines
from app.errors import install_error_handlers
from app.http_protocol import HttpProtocol
from app.middleware import ApiKeys, Draining, RequestId
from app.responses.store import ResponseStoreError
from app.routes import add_routes
from app.served import Served
from app.service import Service
from app.shutdown import Signals, drain
from app.startup_log import log_ready
from app.template import renderer
from app.tokenizer import TokenizerError
from batching.engine.client import EngineStartError
from config.settings import EngineSettings, ServerSettings

logger = logging.getLogger(__name__)

# Longer than clients and proxies keep idle connections, so that it is they who close them: a server
# that does so may have a request under way to it.
_KEEP_ALIVE_SECONDS = 75
_CLOSE_SECONDS = 1  # for connections to close when no request is open any more
_OPEN_FILES = 65536
# Bytes of an answer that the system takes before they can be sent, rather than megabytes: so that
# it is noticed early that a client does not read, and its events merge.
_UNSENT_BYTES = 131072


def create_app(served: Served | Service) -> FastAPI:
    """The ASGI application of the served models, or of a single one that generates."""
    if isinstance(served, Service):
        served = Served(served)
    middleware = [Middleware(RequestId)]
    if served.settings.api_keys:
        middleware.append(Middleware(ApiKeys, keys=served.settings.api_keys))
    middleware.append(Middleware(Draining, served=served))
    app = FastAPI(title="Slipstream", middleware=middleware, docs_url=None, redoc_url=None)
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
        listener = _bind(settings.host, settings.port)
    except OSError as error:
        logger.error("cannot listen on %s port %d: %s", settings.host, settings.port, error)
        return 1
    name = settings.served_model_name or Path(engine.model).name
    engines = Engines()
    signals = Signals(engines.kill)
    try:
        slow_import = asyncio.create_task(asyncio.to_thread(renderer))  # meanwhile
        generator = None if name in pools else engine
        served = await signals.unless_told(engines.start(settings, name, generator, pools))
        if served is None:
            return signals.status
        await slow_import
        try:
            return await _serve_http(served, engines, listener, signals)
        finally:
            if served.generator is not None:
                served.generator.responses.close()
    except (EngineStartError, TokenizerError, ResponseStoreError) as error:
        logger.error("cannot start: %s", error)
        return 1
    finally:
        await engines.close()
        listener.close()


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
    served: Served, engines: Engines, listener: socket.socket, signals: Signals
) -> int:
    config = uvicorn.Config(
        create_app(served),
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
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
