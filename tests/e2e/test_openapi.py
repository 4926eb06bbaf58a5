"""Thousands of requests made from `/openapi.json`, right and wrong, at the real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.server_process import ServerProcess, running

SECONDS = (12, 120)  # the second where a slow machine has not come to every operation in the first


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose context is short, so that what is generated is, too."""
    process = ServerProcess(
        tmp_path_factory.mktemp("server") / "log",
        *("--served-model-name", "tiny", "--max-model-len", "128", "--max-queued-requests", "32"),
    )
    with running(process):
        yield process


def test_schemathesis_finds_no_fault(small: ServerProcess, tmp_path: Path) -> None:
    """No 5xx; wrong requests are refused, answers and errors are as described.

    That a request which fits its schema is accepted cannot be asked for: there are rules that
    schemas do not tell (no `stream_options` without `stream`).
    """
    report = tmp_path / "report.json"
    paths = httpx.get(f"{small.url}/openapi.json").json()["paths"].values()
    operations = sum(len(methods) for methods in paths)
    for seconds in SECONDS:
        run = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{small.url}/openapi.json"),
                *("--phases", "coverage,fuzzing", "--max-time", str(seconds)),
                *("--max-examples", "30", "--exclude-checks", "positive_data_acceptance"),
                *("--continue-on-failure", "--generation-deterministic", "--no-shrink"),
                *("--no-color", "--workers", "1", "--report-json-path", str(report)),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
        found = json.loads(report.read_text())
        assert found["failures"] == [], run.stdout
        if found["operations"]["tested"] == operations:
            break
    assert found["operations"]["tested"] == operations
    assert found["test_cases"]["generated"] > 500
    small.wait_idle()
