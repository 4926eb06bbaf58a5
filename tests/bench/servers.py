"""Start and stop any server from its description, and say what memory its processes used."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from loadtest.client import Client

_STOP_SECONDS = 30.0
_SERVERS = Path(__file__).with_name("servers.yaml")


class Description(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One entry of servers.yaml. `request_tokens` is the longest request that it takes."""

    command: list[str]
    health: str
    needs: list[str] = []  # files without which it cannot run
    environment: dict[str, str] = {}
    ready_seconds: float = 120.0
    request_tokens: int = 4608


class NotInstalledError(Exception):
    """The server, or its form of the model, is not on this machine."""


def descriptions() -> dict[str, Description]:
    """All servers of servers.yaml by name."""
    return msgspec.yaml.decode(_SERVERS.read_bytes(), type=dict[str, Description])


class Server:
    """One running server, started with the model `name` in `folder`.

    Raises `NotInstalledError` when its executable or a needed file is missing, and `RuntimeError`
    with the end of its log if it does not become healthy.
    """

    def __init__(
        self, description: Description, name: str, folder: Path, prefix: str, log: Path
    ) -> None:
        self._description, self._log = description, log
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._peaks: dict[int, int] = {}
        values = {"name": name, "folder": folder, "prefix": prefix, "port": self.port}
        command = [word.format(**values) for word in description.command]
        for needed in description.needs:
            if not Path(needed.format(**values)).exists():
                raise NotInstalledError(f"{needed.format(**values)} does not exist")
        command[0] = _executable(command[0], prefix)
        added = {key: text.format(**values) for key, text in description.environment.items()}
        self.began = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | added,
                start_new_session=True,
            )

    async def wait_healthy(self, client: Client) -> None:
        """Return as soon as the health address answers 200 on `client`."""
        deadline = self.began + self._description.ready_seconds
        while time.perf_counter() < deadline and self._process.poll() is None:
            try:
                async with asyncio.timeout(5):
                    await client.get(self._description.health)
                return
            except msgspec.DecodeError:  # 200 without JSON: vLLM's body is empty
                return
            except (OSError, ValueError):
                await asyncio.sleep(0.05)
        raise RuntimeError(f"not healthy:\n{self._log.read_text(errors='replace')[-2000:]}")

    @property
    def pid(self) -> int:
        """The process that was started: of ours, the front end."""
        return self._process.pid

    def peak_bytes(self) -> int:
        """The sum of the largest resident size each process had, so far.

        Pages that processes share count once for each. Call it while the server runs.
        """
        for pid in tree(self._process.pid):
            self._peaks[pid] = max(_high_water(pid), self._peaks.get(pid, 0))
        return sum(self._peaks.values())

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for whatever of its session is left."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()


def tree(root: int) -> list[int]:
    """`root` and its descendants, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # Behind the command's closing parenthesis: state, parent.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time that one process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _high_water(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = (line.split() for line in status.splitlines() if line.startswith("VmHWM:"))
    return next((int(words[1]) * 1024 for words in lines), 0)


def _executable(name: str, prefix: str) -> str:
    folders = [f"{prefix}/bin", prefix] if prefix else []
    # Ours is installed beside the interpreter that runs the benchmark.
    path = os.pathsep.join([*folders, os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise NotInstalledError(f"there is no {name}: say where with --prefix SERVER=FOLDER")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
