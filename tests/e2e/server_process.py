"""Start and stop the real server as a user would: `slipstream serve` in its own process."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 120.0


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Raises `AssertionError` if the condition does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def exists(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


class ServerProcess:
    """One `slipstream serve` process; `log` holds its output once it stopped."""

    cli = "app.cli"
    engine = "batching.engine.child"

    def __init__(self, log_path: Path, *arguments: str, **environment: str) -> None:
        self.port = free_port()
        self.tls: ssl.SSLContext | bool = True  # how its certificate is verified
        scheme = "http"
        if "--tls-cert" in arguments:
            scheme = "https"
            certificate = arguments[arguments.index("--tls-cert") + 1]
            self.tls = ssl.create_default_context(cafile=certificate)
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self._log_path = log_path
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.cli, "serve", "--port", str(self.port), *arguments],
                cwd=Path(__file__).parents[2],
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_ready(self) -> None:
        """Block until /ready answers 200. Raises with the log if the process ends first."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended at start:\n{self.log()}")
            try:
                if self.get("/ready")[0] == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.1)
        raise RuntimeError(f"the server was not ready in {START_SECONDS} s:\n{self.log()}")

    def get(self, path: str) -> tuple[int, str]:
        """Status and body. Plain sockets: to make a client of httpx takes 50 times as long."""
        where = ("127.0.0.1", self.port)
        connection = (
            http.client.HTTPSConnection(*where, timeout=10, context=self.tls)
            if isinstance(self.tls, ssl.SSLContext)
            else http.client.HTTPConnection(*where, timeout=10)
        )
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def log(self) -> str:
        """All the server printed so far."""
        return self._log_path.read_text(errors="replace")

    def stop(self, timeout: float = 20.0) -> int:
        """SIGTERM and wait. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def metric(self, name: str) -> float:
        """The sum of one series' values over its labels, read from /metrics."""
        _, text = self.get("/metrics")
        values = re.findall(
            rf"^{re.escape(name)}(?:\{{[^}}]*\}})? ([0-9.e+-]+)$", text, re.MULTILINE
        )
        if not values:
            raise KeyError(name)
        return sum(map(float, values))

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        self.process.kill()
        self.process.wait()

    def engine_pid(self, module: str | None = None) -> int:
        """The engine child, or the one that runs `module`; the oldest, if several do."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for child in children.read_text().split():
            if (module or self.engine) in Path(f"/proc/{child}/cmdline").read_text().split("\0"):
                return int(child)
        raise AssertionError(f"no child runs {module or self.engine}")

    def signal_engine(self, number: int, module: str | None = None) -> None:
        """Send a signal to the engine child, or to the one that runs `module`."""
        os.kill(self.engine_pid(module), number)

    def wait_health(self, status: int, seconds: float) -> None:
        """Until /health answers with a status. Raises if that takes longer."""
        deadline = time.monotonic() + seconds
        while (now := self.get("/health")[0]) != status:
            if time.monotonic() > deadline:
                raise AssertionError(f"health is {now}, not {status}:\n{self.log()}")
            time.sleep(0.02)

    def wait_idle(self) -> None:
        """Until nothing runs, waits or holds a KV block. Raises if that takes over 5 seconds."""
        gauges = (
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
        )
        deadline = time.monotonic() + 5.0
        while any(self.metric(g) for g in gauges):
            if time.monotonic() > deadline:
                raise AssertionError({g: self.metric(g) for g in gauges})
            time.sleep(0.05)


class FaultyServer(ServerProcess):
    """A server whose engines make up tokens and fail as asked (see `faulty_cli`)."""

    cli = "tests.e2e.faulty_cli"
    engine = "tests.e2e.faulty_child"


class StarvingServer(ServerProcess):
    """A real server whose engine runs out of memory on SIGUSR1 (see `starving`)."""

    cli = engine = "tests.e2e.starving"


@contextmanager
def running(
    server: ServerProcess, end: Callable[[ServerProcess], object] = ServerProcess.stop
) -> Iterator[None]:
    """It is ready in the context, and ended behind it."""
    try:
        server.wait_ready()
        yield
    finally:
        end(server)
