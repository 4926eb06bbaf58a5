"""`slipstream calibrate [MODEL] [flags of serve]`: measure this machine for the digital twin.

Starts a server of its own with an event log, drives it, and writes what it learnt.
"""

from __future__ import annotations

import asyncio
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from config.child_environment import available_cores
from config.flags import OneLineParser, ServeParser
from config.load import SettingsError, load_settings
from config.sizes import ON_CPU
from loadtest.client import Client
from loadtest.events import Outcome
from loadtest.flags import new_file, positive
from loadtest.twin.calibrate import Calibration, Driver, learn

_NAME = "calibrated"
_START_SECONDS = 900.0


def main(arguments: Sequence[str]) -> int:
    """Measure and write a profile. Returns 0, 1 if measuring failed, 2 for wrong usage."""
    parser = OneLineParser(
        prog="slipstream calibrate", description=__doc__, allow_abbrev=False,
        epilog="All other flags are those of slipstream serve, and change the profile as they "
        "change the server.",
    )  # fmt: skip
    parser.add_argument("--for", dest="seconds", type=positive(float), default=20.0,
                        help="seconds [20]")  # fmt: skip
    parser.add_argument("--out", type=new_file, required=True, help="profile to write, JSON")
    ours, rest = parser.parse_known_args(arguments)
    try:
        engine, _ = load_settings(vars(ServeParser().parse_args(rest)))
    except SettingsError as error:
        print(f"slipstream calibrate: error: {error}", file=sys.stderr)
        return 2
    try:
        found = _measure(rest, ours.seconds, engine.max_sequences or ON_CPU.max_sequences)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"slipstream calibrate: error: {error}", file=sys.stderr)
        return 1
    about = {
        "schema": 1,
        "model": Path(engine.model).name or "built-in",
        "machine": _cpu_name(),
        "cores": available_cores(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    profile: dict[str, Any] = about | msgspec.to_builtins(found)
    ours.out.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
    print(
        f"{found.steps} steps, one is predicted within {found.error:.1%} on average; "
        f"{found.front.request * 1e3:.2f} ms for a request outside the engine: {ours.out}"
    )
    return 0


def _measure(flags: Sequence[str], seconds: float, sequences: int) -> Calibration:
    """Serve with these flags, drive, stop, learn."""
    with tempfile.TemporaryDirectory() as folder:
        log, port = Path(folder) / "events", _free_port()
        ours = ["--host", "127.0.0.1", "--port", str(port), "--event-log", str(log)]
        ours += ["--served-model-name", _NAME, "--log-level", "error"]
        ours += ["--event-log-mib", "65536"]  # all of it is read
        command = [sys.executable, "-m", "app.cli", "serve", *flags, *ours]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{port}"
            batches = asyncio.run(_drive(server, url, seconds, sequences))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
        with log.open("rb") as lines:
            return learn(lines, batches)


async def _drive(
    server: subprocess.Popen[bytes], url: str, seconds: float, sequences: int
) -> list[list[Outcome]]:
    client = Client(url, clock=time.monotonic)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start")
            try:
                await client.get_bytes("/ready")
                break
            except (OSError, ValueError):
                await asyncio.sleep(0.1)
        context = (await client.get("/v1/models"))["data"][0]["max_model_len"]
        return await Driver(client, _NAME, context, sequences).run(seconds)
    finally:
        client.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
