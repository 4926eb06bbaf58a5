"""The life of the server's process: engines first, all else while they start, and the end."""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from app.engines import Engines
from app.http.tls import TlsError, tls_options
from app.shutdown import Signals
from app.start_error import StartError
from app.startup_log import log_ready
from batching.engine.stream import EngineStartError
from config.settings import EngineSettings, ServerSettings

if TYPE_CHECKING:
    from app.application import FrontEnd, HttpServer
    from app.served import Served
    from app.telemetry.tracing import Tracing

logger = logging.getLogger(__name__)

_OPEN_FILES = 65536
# New objects before a garbage collection looks at them. A request has some hundred: with Python's
# 700, collections would take a tenth of the time of streaming.
_YOUNG_OBJECTS = 10_000
# Bytes of an answer that the system takes before they can be sent, rather than megabytes: so that
# it is noticed early that a client does not read, and its events merge.
_UNSENT_BYTES = 131072


class MissingExtraError(StartError):
    """A setting needs a package that is not installed; the message says how to get it."""


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
        tls = tls_options(settings)
        listener = _bind(settings.host, settings.port)
    except TlsError as error:
        logger.error("%s", error)
        return 1
    except OSError as error:
        logger.error("cannot listen on %s port %d: %s", settings.host, settings.port, error)
        return 1
    name = settings.served_model_name or Path(engine.model).name
    generator = None if name in pools else with_policy(engine, settings)
    engines = Engines(generator, pools)
    signals = Signals(engines.kill)
    tracing = None
    try:
        tracing = load_tracing(settings.otlp_endpoint)
        front_end = await signals.unless_told(
            _start(engines, partial(_front_end, settings, name, generator, pools))
        )
        if front_end is None:
            return signals.status
        served = front_end.serve(engines)
        if tracing is not None:
            served.listeners.append(tracing.ended)
        try:
            http = front_end.listen(served, tls, listener)
            log_ready(
                {model.name: model.capabilities for model in served.models},
                _url(listener, "https" if tls else "http"),
            )
            return await _serve_http(http, served, engines, signals)
        finally:
            if served.generator is not None:
                served.generator.responses.close()
    except (EngineStartError, StartError) as error:
        logger.error("cannot start: %s", error)
        return 1
    finally:
        await engines.close()
        listener.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)


async def _start(engines: Engines, front_end: Callable[[], FrontEnd]) -> FrontEnd:
    """Launch the engines, and make the front end while they start.

    Raises `EngineStartError` and `StartError`.
    """
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(engines.start())  # first: theirs is the longer way
            made = group.create_task(asyncio.to_thread(front_end))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    front = made.result()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, front.keys.reload)
    return front


def _front_end(
    settings: ServerSettings,
    name: str,
    generator: EngineSettings | None,
    pools: Mapping[str, EngineSettings],
) -> FrontEnd:
    """Here, because the import takes longer than launching the engines."""
    from app.application import FrontEnd

    return FrontEnd(settings, name, generator, pools)


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


async def _serve_http(http: HttpServer, served: Served, engines: Engines, signals: Signals) -> int:
    """Until told to stop, or no engine is left."""
    gc.freeze()  # what is there now lives for ever, and a look at it stops all streams for 50 ms
    gc.set_threshold(_YOUNG_OBJECTS)
    told, dead = asyncio.create_task(signals.wait()), asyncio.create_task(engines.given_up())
    await asyncio.wait({http.serving, told, dead}, return_when=asyncio.FIRST_COMPLETED)
    served.draining = True  # still accepting connections, so that /health can say so
    await http.close(served.settings.drain_seconds)
    for task in (told, dead):
        task.cancel()
    return 1 if dead.done() else 0


def _url(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
