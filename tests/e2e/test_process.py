"""The process as a user meets it: start-up log, refusals, SIGTERM, exit codes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

from batching.worker.device import serving_dtype
from tests.e2e.server_process import ServerProcess


def test_start_log_says_what_it_serves_and_sigterm_ends_it_cleanly(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "log")
    server.wait_ready()
    answer = httpx.post(
        f"{server.url}/v1/completions", json={"prompt": "Once upon", "max_tokens": 4}, timeout=30
    )
    assert answer.status_code == 200, answer.text
    assert server.stop() == 0
    log = server.log()
    served = serving_dtype("auto", torch.bfloat16, torch.device("cpu"))
    dtype = str(served).removeprefix("torch.")
    for word in (f"{dtype} on cpu", "KV cache", "tokens", f"127.0.0.1:{server.port}"):
        assert word in log, log


def test_a_folder_without_a_model_is_refused_in_one_clear_line(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "log", str(tmp_path))
    assert server.process.wait(60) != 0
    assert "Traceback" not in server.log()
    assert str(tmp_path) in server.log()


def test_health_tells_of_a_dead_engine_until_another_serves(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "log", "--worker", "simulated")
    try:
        server.wait_ready()
        server.signal_engine(signal.SIGKILL)
        server.wait_health(503, 5)
        answer = httpx.get(f"{server.url}/ready")
        if answer.status_code != 200:
            assert "SIGKILL" in answer.json()["error"]["message"]
        server.wait_health(200, 120)
        assert server.metric("slipstream_engine_restarts_total") == 1
        assert server.stop() == 0
    finally:
        server.process.kill()
        server.process.wait()


def test_kernels_that_cannot_be_compiled_are_no_secret(tmp_path: Path) -> None:
    """It serves all the same, much slower: whoever runs it must learn why."""
    server = ServerProcess(tmp_path / "log", HOME=str(tmp_path), PATH="/nowhere")
    try:
        server.wait_ready()
        assert "slipstream-tiny works, but: attention backend reference; not cpu" in server.log()
        _, health = server.get("/health")
        assert "no g++ on the PATH" in json.loads(health)["warnings"][0]
        _, metrics = server.get("/metrics")
        assert re.search(r'slipstream_engine_info\{.*degraded="true".*\} 1', metrics)
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Once"}, timeout=60)
        assert answer.status_code == 200
        assert server.stop() == 0
    finally:
        server.kill()


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"]])
def test_help_fits_on_one_screen(arguments: list[str]) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "app.cli", *arguments], capture_output=True, text=True, check=True
    )
    lines = shown.stdout.splitlines()
    assert 5 < len(lines) <= 60
    assert max(map(len, lines)) <= 100
