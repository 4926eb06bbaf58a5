"""`slipstream simulate` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import loadtest
from loadtest.cli import main as bench
from loadtest.twin.simulate import main
from tests.loadtest.scripted_server import ManualClock, serving
from tests.loadtest.test_scenarios import Fake

TRACE = str(Path(loadtest.__file__).parent / "data" / "azure-conv-2023.csv")


def simulate(out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    code = main([*flags, "--out", str(out)])
    return code, json.loads(out.read_text())


def test_a_trace_gives_the_figures_and_the_page_of_a_bench(tmp_path: Path) -> None:
    page, slo = tmp_path / "page.html", tmp_path / "slo.yaml"
    slo.write_text("default: {ttft_ms: 1000}\n")
    flags = [TRACE, "--replicas", "2", "--slo", str(slo), "--html", str(page), "--seconds", "30"]
    code, result = simulate(tmp_path / "out.json", *flags, "--routing", "round-robin")
    assert code == 0
    summary = result["summary"]
    assert summary["requests"]["sent"] == summary["requests"]["completed"] > 20
    assert summary["goodput"]["share"] > 0 and summary["disagreements"] == {}
    assert result["twin"]["replicas"] == 2 and 0 < result["twin"]["busy_share"] <= 1
    assert {"running", "waiting", "kv"} <= set(result["server"][0])
    assert "Queue and batch" in page.read_text()


def test_equal_commands_give_equal_results(tmp_path: Path) -> None:
    runs = [simulate(tmp_path / f"{i}.json", TRACE, "--seconds", "60")[1] for i in range(2)]
    assert runs[0]["summary"] == runs[1]["summary"]
    assert runs[0]["timeline"] == runs[1]["timeline"]


def test_a_trace_may_be_repeated(tmp_path: Path) -> None:
    _, once = simulate(tmp_path / "1.json", TRACE, "--length-scale", "0.1")
    _, thrice = simulate(tmp_path / "3.json", TRACE, "--length-scale", "0.1", "--repeat-trace", "3")
    assert thrice["summary"]["requests"]["sent"] == 3 * once["summary"]["requests"]["sent"]
    assert thrice["summary"]["seconds"] == pytest.approx(3 * once["summary"]["seconds"], rel=0.1)


@pytest.mark.parametrize("load", ["--concurrency 3", "--rate 500"])
async def test_the_load_of_a_result_is_simulated_beside_it(tmp_path: Path, load: str) -> None:
    import asyncio

    measured, out, page = (tmp_path / name for name in ("m.json", "s.json", "page.html"))
    flags = f"{load} --requests 12 --input-tokens 9 --output-tokens 4 --out {measured}"

    def both(url: str) -> tuple[int, dict[str, Any]]:
        bench(["--url", url, *flags.split()])
        return simulate(out, "--like", str(measured), "--html", str(page))

    async with serving(Fake().script, ManualClock()) as server:
        code, result = await asyncio.to_thread(both, server.url)
    assert code == 0
    assert result["summary"]["tokens"] == {"input": 108, "output": 48, "cached": 0}
    rows = {row["figure"]: row for row in result["predicted"]}
    real = json.loads(measured.read_text())["summary"]["throughput"]["output_tokens_per_second"]
    assert rows["output tokens/s"]["measured"] == pytest.approx(real)
    assert "Predicted beside measured" in page.read_text()


@pytest.mark.parametrize("load", ["--concurrency 3", "--rate 500"])
@pytest.mark.parametrize("turns", [1, 3])
async def test_chats_are_simulated_with_the_lengths_that_were_counted(
    tmp_path: Path, load: str, turns: int
) -> None:
    import asyncio

    measured, out = tmp_path / "m.json", tmp_path / "s.json"
    flags = f"{load} --workload chat --turns {turns} --think 0.01 --requests 6 --input-tokens 40"
    flags += f" --output-tokens 4 --out {measured}"

    def both(url: str) -> tuple[int, dict[str, Any]]:
        bench(["--url", url, *flags.split()])
        return simulate(out, "--like", str(measured))

    async with serving(Fake("one two three four").script, ManualClock()) as server:
        code, result = await asyncio.to_thread(both, server.url)
    assert code == 0
    real, found = json.loads(measured.read_text())["summary"], result["summary"]
    assert found["requests"]["completed"] == real["requests"]["completed"] == 6 * turns
    assert found["tokens"]["output"] == real["tokens"]["output"]
    assert found["tokens"]["input"] == pytest.approx(real["tokens"]["input"], rel=0.05)
    assert (found["tokens"]["cached"] > 0) == (turns > 1)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([TRACE, "--hardware", "abacus"], "abacus"),
        (["nowhere.csv"], "nowhere.csv"),
        ([TRACE, "--model", "nowhere"], "nowhere"),
        ([TRACE, "--hardware", "none.json"], "none.json"),
        (["--like", TRACE], "no result"),
        (["--like", "{folder}/bare.json"], "does not say what its load was"),
        ([TRACE, "--max-model-len", "9999"], "the model's context of 2048"),
    ],
)
def test_what_cannot_be_is_one_line(
    flags: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bare.json").write_text('{"summary": {}}')
    assert main([flag.format(folder=tmp_path) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
