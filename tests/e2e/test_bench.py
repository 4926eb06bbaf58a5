"""`slipstream bench` against the real server: what it says agrees with what the server says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loadtest
from loadtest.cli import main
from tests.e2e.server_process import ServerProcess

DATA = Path(loadtest.__file__).parent / "data"


def bench(server: ServerProcess, out: Path, flags: str) -> tuple[int, dict[str, Any]]:
    code = main(["--url", server.url, "--out", str(out), *flags.split()])
    return code, json.loads(out.read_text())


def test_usage_stream_and_metrics_agree(server: ServerProcess, tmp_path: Path) -> None:
    flags = "--concurrency 4 --requests 24 --input-tokens 40 --output-tokens 16"
    code, result = bench(server, tmp_path / "out.json", flags)
    assert code == 0
    assert result["summary"]["tokens"]["output"] == 24 * 16
    # A token of half a character shows no text; all else would be a fault of counting.
    assert set(result["summary"]["disagreements"]) <= {"tokens but no text"}
    assert result["server"] and {"running", "waiting", "kv"} <= set(result["server"][0])


def test_chats_hit_the_prefix_cache(server: ServerProcess, tmp_path: Path) -> None:
    flags = "--workload chat --turns 3 --think 0.01 --requests 4 --concurrency 2 --warmup 0"
    code, result = bench(server, tmp_path / "out.json", f"{flags} --input-tokens 60")
    assert code == 0
    assert result["summary"]["requests"]["completed"] == 12
    assert result["summary"]["tokens"]["cached"] > 0


def test_structured_answers_are_json(server: ServerProcess, tmp_path: Path) -> None:
    flags = "--workload structured --requests 4 --concurrency 2 --warmup 0 --output-tokens 120"
    code, result = bench(server, tmp_path / "out.json", f"{flags} --input-tokens 5")
    assert code == 0
    assert result["summary"]["json"] == {"asked": 4, "valid": 4}


def test_a_replayed_trace(server: ServerProcess, tmp_path: Path) -> None:
    trace = f"--trace {DATA}/azure-conv-2023.csv --seconds 30 --time-scale 0.05"
    page = tmp_path / "page.html"
    flags = f"{trace} --length-scale 0.1 --html {page}"
    code, result = bench(server, tmp_path / "out.json", flags)
    assert code == 0
    assert result["summary"]["requests"]["completed"] > 20
    assert "Queue and batch" in page.read_text()


def test_the_server_survives_chaos(server: ServerProcess, tmp_path: Path) -> None:
    flags = "--chaos --requests 30 --concurrency 4 --output-tokens 32"
    code, result = bench(server, tmp_path / "out.json", flags)
    assert [c for c in result["chaos"] if not c["passed"]] == []
    assert code == 0
    assert {c["name"] for c in result["chaos"]} >= {"malformed", "oversized", "slow reader"}
