"""Where the server listens."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.e2e.server_process import ServerProcess


def test_a_port_in_use_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        server = ServerProcess(tmp_path / "log", "--port", port)
        assert server.process.wait(60) == 1
    (line,) = server.log().splitlines()
    assert f"cannot listen on 127.0.0.1 port {port}" in line
