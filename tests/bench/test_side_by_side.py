"""The arithmetic of the side-by-side table, and its servers: a wrong ratio would mislead us."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import to_builtins
from safetensors.torch import save_file

from loadtest.client import Client
from loadtest.events import Outcome
from tests.bench import bench_gpu, bench_gpu_step
from tests.bench.first_gpu_minutes import Stage, run_all
from tests.bench.machine import Machine, ModelSize, model_size, output_rate, token_seconds
from tests.bench.report import busy_loss, limit_share, markdown
from tests.bench.servers import Description, NotInstalledError, Server, descriptions
from tests.bench.workloads import CASES, first_token, gaps_around, run_case
from tests.conftest import HAS_GPU
from tests.worker import tiny_models
from tests.worker.interpreting import make_interpreting_cheap

SIZE = ModelSize(weight_bytes=1000, parameters=500, layer_parameters=400)
LIMITS = Machine(bandwidth=1e5, bf16=1e6, float32=1e5, idle=1.0)


def _result(rates: dict[str, list[float]], case: str) -> dict[str, Any]:
    return {
        "cpu": "a CPU", "cores": 2, "started": "now", "commit": "abc", "rounds": 3,
        "models": {"M": {"size": to_builtins(SIZE)}},
        "machine": [{"bandwidth": 1e5, "bf16": 1e6, "float32": 1e5, "idle": 1.0}],
        "notes": [],
        "runs": [
            {
                "server": server, "model": "M", "start_seconds": 2.0, "peak_gb": 1.5,
                "cases": {case: {"output_rate": rate, "ttft_ms": 5.0, "tpot_ms": 1e3 / rate}},
            }
            for server, found in rates.items()
            for rate in found
        ],
    }  # fmt: skip


def test_a_step_takes_the_longer_of_reading_and_computing() -> None:
    assert token_seconds(SIZE, LIMITS, 1) == 1000 / 1e5
    assert token_seconds(SIZE, LIMITS, 100) == 2 * 500 * 100 / 1e6


def test_the_best_rate_is_prefill_and_then_decode_steps() -> None:
    rate = output_rate(SIZE, LIMITS, prompt_tokens=1000, output_tokens=30, sequences=4)
    assert rate == pytest.approx(30 / (2 * 400 * 1000 / 1e6 + 8 * 0.01))


@pytest.mark.parametrize("tied", [True, False])
def test_only_weights_that_a_step_reads_count(tmp_path: Path, tied: bool) -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(10, 4), "model.layer": torch.zeros(4, 3)}
    if not tied:
        tensors["lm_head.weight"] = torch.zeros(10, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    assert model_size(tmp_path) == ModelSize(4 * 52, 52, 12)


def test_ratios_are_of_medians() -> None:
    result = _result({"ours": [300.0, 100.0, 200.0], "other": [90.0, 100.0, 400.0]}, "M-1")
    (case,) = (case for case in CASES if case.key == "M-1")
    lines = markdown(result, [case]).splitlines()
    (row,) = (line for line in lines if "| other |" in line and "single" in line)
    assert "| 100.0 (90.0–400.0) | 5 | 10.0 | 2.00 | 0.50 | 100% |" in row
    assert limit_share(result, "ours", case) == 2.0  # 5 ms where reading alone takes 10


def test_loss_to_a_busy_core_is_against_the_same_server() -> None:
    result = _result({"ours": [200.0]}, "M-16")
    result["runs"][0]["cases"]["M-busy"] = {"output_rate": 150.0}
    assert busy_loss(result, "ours") == 0.25
    assert busy_loss(result, "other") is None


def test_a_shared_beginning_is_counted_once() -> None:
    (case,) = (case for case in CASES if case.key == "M-prefix")
    assert case.computed_prompt_tokens == 512 + 48 * 64


def test_the_worst_gap_is_after_the_long_prompt() -> None:
    streams = [
        Outcome(0.0, 9.0, chunk_times=[1.0, 1.5, 1.6, 1.7, 1.8]),
        Outcome(0.0, 9.0, chunk_times=[1.0, 1.1, 1.4]),
    ]
    figures = gaps_around(streams, Outcome(1.55, 9.0, chunk_times=[3.55]))
    assert figures["worst_gap_ms"] == pytest.approx(100.0)
    assert figures["median_gap_before_ms"] == pytest.approx(300.0)
    assert figures["gap_ratio"] == pytest.approx(1.0)
    assert figures["long_ttft_ms"] == pytest.approx(2000.0)


def test_a_long_prompt_that_came_too_late_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="while the streams ran"):
        gaps_around([Outcome(0.0, 2.0, chunk_times=[1.0, 2.0])], Outcome(5.0, 6.0))


@pytest.mark.parametrize("name", ["vllm", "llama.cpp"])
def test_what_is_not_installed_says_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotInstalledError, match=str(tmp_path)):
        Server(descriptions()[name], "S", tmp_path, str(tmp_path), tmp_path / "log")


async def test_a_server_is_started_measured_and_stopped(tmp_path: Path) -> None:
    command = descriptions()["slipstream"].command
    (tmp_path / "config.json").write_text('{"vocab_size": 3000, "max_position_embeddings": 4608}')
    _word_tokenizer(tmp_path)
    simulated = Description([*command, "--worker", "simulated"], health="/ready")
    server = Server(simulated, "M", tmp_path, "", tmp_path / "log")
    client = Client(server.url)
    try:
        await server.wait_healthy(client)
        await first_token(client, "M")
        for case in CASES:
            if case.key in {"M-prefix", "M-busy"}:
                figures = await run_case(client, case.shortened(), seed=1)
                assert figures["output_rate"] > 0
        assert server.peak_bytes() > 10_000_000
    finally:
        client.close()
        server.stop()
    with pytest.raises(OSError):
        await Client(server.url).get("/ready")


def _word_tokenizer(folder: Path) -> None:
    from tests.bench.make_models import tokenizer

    tokenizer(3000).save_pretrained(folder)


def test_the_gpu_table_has_ratios_and_what_was_not_measured() -> None:
    def run(server: str, model: str, **cases: tuple[float, float]) -> dict[str, Any]:
        figures = {
            key.replace("_", "-"): {"output_rate": rate, "tpot_ms": tpot, "busy": 0.97}
            for key, (rate, tpot) in cases.items()
        }
        return {"server": server, "model": model, "start_seconds": 9.0, "cases": figures}

    result = {
        "machine": {"bandwidth": 1e12, "attention": {"L": {"ms": 0.5, "share": 0.8}}},
        "models": {"M": 1e9, "L": 16e9},
        "runs": [
            run(bench_gpu.OURS, "M", M_256=(1200.0, 9.0), M_1=(0.0, 1.3)),
            run(bench_gpu.PEER, "M", M_256=(1000.0, 9.0)),
            run(bench_gpu.OURS, "L", L_1=(0.0, 20.0)),
        ],
    }
    lines = bench_gpu.table(result).splitlines()
    assert "| 1200 tok/s (1.20 ×) | 1000 tok/s | 1.0 × vLLM |" in lines[2]
    assert "| – | – | 0.95 × vLLM |" in lines[3]
    assert "| 1.30 (1.30 ms) | – | ≤ 1.35 |" in lines[4]
    assert "| 1.25 (20.00 ms) | – | ≤ 1.35 |" in lines[5]
    assert "| 97% | 97% | 95 % |" in lines[6]
    assert "| 9.0 s | – | 20 s |" in lines[8]
    assert "| 80% (0.500 ms) | – | 70 % |" in lines[9]


def test_the_busy_share_is_that_of_the_middle() -> None:
    assert bench_gpu.busy_share("0\n3\n99\n98\n97\n99\n4\n0\n") == 0.985
    assert bench_gpu.busy_share("[N/A]\n") is None


def test_an_interrupted_run_shows_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = b'{"bandwidth": 1e12, "attention": {}}'
    done = subprocess.CompletedProcess([], 0, found)
    monkeypatch.setattr(bench_gpu.subprocess, "run", lambda *_, **__: done)

    def measure_all(options: Namespace, result: dict[str, Any]) -> None:
        run = {"server": bench_gpu.OURS, "model": "L", "start_seconds": 9.0, "cases": {}}
        result["runs"].append(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_gpu, "measure_all", measure_all)
    bench_gpu.main(["--out", str(tmp_path / "gpu.json")])
    assert "| L: start to first token | 9.0 s | – |" in capsys.readouterr().out
    assert b'"interrupted"' in (tmp_path / "gpu.json").read_bytes()


def test_stages_end_in_time_and_say_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    planned = {
        "good": Stage([python("print(1)"), python("print(22)")], 250),
        "bad": Stage([python("raise SystemExit(3)")], 250),
        "slow": Stage([python("import time; time.sleep(300)")], 1),
    }
    ended = run_all(planned, 900, tmp_path)
    assert ended["good"].endswith("exit 0, 0") and ended["bad"].endswith("exit 3")
    assert ended["slow"].endswith("exit out of time")
    assert "22\n" in capsys.readouterr().out
    assert run_all(planned, 1, tmp_path) == dict.fromkeys(planned, "not begun")


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_its_benchmarks_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "tests.bench.bench_gpu"]  # which asks `gpu_machine`
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs an NVIDIA GPU, and torch" in done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.setattr(sys, "argv", ["bench_gpu_step", "MODEL"])
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU, and torch"):
        bench_gpu_step.main()


def test_the_step_table_has_a_row_for_each_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_models.save("qwen3", tmp_path, max_position_embeddings=4096)
    monkeypatch.setattr(bench_gpu_step, "bandwidth", lambda: 1e9)
    names = ("transformers' layers", "fused, int8 weights")
    variants = {name: bench_gpu_step.VARIANTS[name] for name in names}
    monkeypatch.setattr(bench_gpu_step, "VARIANTS", variants)  # kernels may be interpreted:
    monkeypatch.setattr(bench_gpu_step, "CONTEXT", 3)  # that takes long
    monkeypatch.setattr(bench_gpu_step, "KV_CACHE_GIB", 0.01)
    monkeypatch.setattr(bench_gpu_step.load, "has_triton", lambda device: True)
    make_interpreting_cheap(monkeypatch)
    bench_gpu_step.measure(Namespace(model=folder, sequences=[1, 2], rounds=2))
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| 0.00 TB/s | 1 × 3: ms (÷ weights) | 2 × 3: ms (÷ weights) |"
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in variants]


def test_the_table_of_draws_has_a_row_for_each_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_gpu_step, "DEVICE", "cpu")
    monkeypatch.setattr(bench_gpu_step, "ROWS", (1, 2))
    monkeypatch.setattr(bench_gpu_step, "milliseconds", lambda run: (run(), 1.5)[1])
    bench_gpu_step.draws(100)
    *_, one, two = capsys.readouterr().out.splitlines()
    assert one == "| 1 | 1.500 (1.500) | 1.500 (1.500) | 1.500 (1.500) | 1.500 (1.500) |"
    assert two.startswith("| 2 |")
