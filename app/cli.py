"""The `slipstream` command. Imports lazily, so that help and errors come at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from config.settings import EngineSettings, ServerSettings

_USAGE = """\
usage: slipstream COMMAND [flags]

  serve [MODEL]   serve a model over HTTP (default: the built-in model)
  bench           measure an OpenAI-style server
  compare A B     what changed between two results; fails on a regression
  key new NAME    make an API key for a file of keys
  calibrate       measure how long a model's steps take on this machine
  simulate TRACE  predict what a server or a hundred would do under recorded traffic
  fit [MODEL]     whether a model fits on what hardware, its speed, cost and settings
  replay FILE     make a server's decisions again from its event log; one request's story
  plan TRACE      how many replicas carry a trace within an SLO, and their price
  --version       print the version

`slipstream COMMAND --help` lists a command's flags."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 2 for wrong usage or settings, 130 after ^C."""
    typed = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _command(*(typed or ["--help"]))
    except KeyboardInterrupt:
        print("slipstream: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _command(command: str, *rest: str) -> int:
    match command:
        case "serve":
            return _serve(rest)
        case "bench":
            from loadtest.cli import main as bench

            return bench(rest)
        case "calibrate":
            from app.calibration import main as calibrate

            return calibrate(rest)
        case "simulate":
            from loadtest.twin.simulate import main as simulate

            return simulate(rest)
        case "fit":
            from loadtest.twin.fit import main as fit

            return fit(rest)
        case "plan":
            from loadtest.twin.plan import main as plan

            return plan(rest)
        case "key":
            from app.access.new_key import main as key

            return key(rest)
        case "replay":
            from app.replay import main as replay

            return replay(rest)
        case "compare":
            from loadtest.compare import main as compare

            return compare(rest)
        case "--version" | "-V" | "version":
            from importlib.metadata import version

            print(f"slipstream {version('slipstream')}")
            return 0
        case "--help" | "-h" | "help":
            print(_USAGE)
            return 0
    return _complain("slipstream", f"there is no command {command!r} (see slipstream --help)")


def _serve(arguments: Sequence[str]) -> int:
    from app.model_source import ModelSourceError
    from config.flags import ServeParser
    from config.load import SettingsError, load_settings

    flags = vars(ServeParser().parse_args(arguments))
    try:
        with _ended_by_signals():
            engine, server = _with_model(*load_settings(flags))
            pools = _pools(engine, server)
    except (SettingsError, ModelSourceError) as error:
        return _complain("slipstream serve", str(error))
    from app.server import serve
    from app.telemetry.log_format import configure_logging

    configure_logging(server.log_level, server.log_format)
    return serve(engine, server, pools)


def _with_model(
    engine: EngineSettings, server: ServerSettings
) -> tuple[EngineSettings, ServerSettings]:
    """Settings with the model's folder and public name filled in. Raises `SettingsError`."""
    from app.model_source import find_model
    from config.load import SettingsError

    log = engine.event_log
    if log is not None and not os.access(Path(log).absolute().parent, os.W_OK):
        raise SettingsError(f"--event-log: cannot write in the folder of {log}")
    source = find_model(
        engine.model,
        engine.revision,
        trust_remote_code=engine.trust_remote_code,
        allow_pickle=engine.allow_pickle,
    )
    name = server.served_model_name or source.name
    return (
        engine.model_copy(update={"model": str(source.folder)}),
        server.model_copy(update={"served_model_name": name}),
    )


def _pools(engine: EngineSettings, server: ServerSettings) -> dict[str, EngineSettings]:
    """The pooling models by public name, each with the settings of its own engine.

    They share the settings of the first model, but for those that concern its weights and lengths.
    A first model that pools is among them. Raises `SettingsError` and `ModelSourceError`.
    """
    from app.model_source import find_model, is_pooling
    from config.load import SettingsError

    pools = {}
    runner = engine.runner
    if runner == "pooling" or (runner == "auto" and is_pooling(Path(engine.model))):
        pools[str(server.served_model_name)] = engine
    for spec in server.also:
        name, _, model = ("", "", spec) if Path(spec).exists() else spec.rpartition("=")
        source = find_model(
            model, trust_remote_code=engine.trust_remote_code, allow_pickle=engine.allow_pickle
        )
        name = name or source.name
        if name in (*pools, server.served_model_name):
            raise SettingsError(f"--also: two models are called {name!r}; write NAME={model}")
        own = {"model": str(source.folder), "revision": None, "quantization": "none"}
        pools[name] = engine.model_copy(update=own | {"max_model_len": None, "event_log": None})
    return pools


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """While models are downloaded: a container's first process ignores what it does not handle."""
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, _: sys.exit(128 + number))
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _complain(program: str, message: str) -> int:
    print(f"{program}: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
