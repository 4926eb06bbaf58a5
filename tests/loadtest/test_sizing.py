"""Sizing: replicas by bisection, what does not fit and what would, costs that add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

import loadtest
from loadtest.slo import Limits, Slo, meets
from loadtest.traces import load_trace
from loadtest.twin.fit import main as fit
from loadtest.twin.hardware import load_hardware
from loadtest.twin.jobs import trace_jobs
from loadtest.twin.model_card import load_card
from loadtest.twin.plan import main as plan
from loadtest.twin.sizing import (
    Server,
    Shape,
    cost_per_million,
    fewest_replicas,
    goodput,
    saturated,
    smallest_server,
)
from tests.loadtest.test_capacity import LLAMA_8B, LLAMA_70B, card

TRACE = Path(loadtest.__file__).parent / "data" / "azure-conv-2023.csv"
SHAPE = Shape(300, 20)


def slow_server(tmp_path: Path) -> Server:
    """A model that is heavy for its hardware, so that little traffic needs several replicas."""
    model = card(tmp_path, LLAMA_8B)
    server = smallest_server(model, load_hardware("l4"), context=2048)
    assert server is not None and server.devices == 1
    return server


def test_replicas_are_the_fewest_that_keep_the_promises(tmp_path: Path) -> None:
    server, trace = slow_server(tmp_path), load_trace(TRACE)[:120]
    trace = [msgspec.structs.replace(r, offset=r.offset / 4, input_tokens=400) for r in trace]
    slo = Slo(default=Limits(ttft_ms=1500), share=0.9)
    found = fewest_replicas(server, trace, slo, "least-loaded")
    assert found is not None and found.replicas > 1
    assert meets(found.outcomes, slo)
    fewer = server.fleet(found.replicas - 1).open_loop(trace_jobs(trace))
    assert not meets(fewer, slo)
    assert found.price_per_day == pytest.approx(found.replicas * 24 * 0.44)
    assert 0 < found.busy_share <= 1


def test_a_promise_that_no_replica_keeps(tmp_path: Path) -> None:
    trace = load_trace(TRACE)[:20]
    impossible = Slo(default=Limits(ttft_ms=0.001))
    assert fewest_replicas(slow_server(tmp_path), trace, impossible, "round-robin") is None


def test_goodput_lies_below_saturation_and_grows_with_patience(tmp_path: Path) -> None:
    server = slow_server(tmp_path)
    most = saturated(server, SHAPE)["requests/s"]
    strict = goodput(server, SHAPE, Slo(default=Limits(ttft_ms=400, tpot_ms=90)))
    patient = goodput(server, SHAPE, Slo(default=Limits(ttft_ms=3000, tpot_ms=400)))
    assert strict is not None and patient is not None
    assert strict["rate"] < patient["rate"] < 1.2 * most
    assert goodput(server, SHAPE, Slo(default=Limits(ttft_ms=0.01))) is None


def test_costs() -> None:
    model = load_card("")
    server = smallest_server(model, load_hardware("h100"))
    assert server is not None
    # 2.69 dollars an hour at 1,000 tokens a second are 3.6 million tokens
    assert cost_per_million(server, 1000.0) == pytest.approx(2.69 / 3.6)


def test_a_large_model_takes_more_devices(tmp_path: Path) -> None:
    model = card(tmp_path, LLAMA_70B)
    counts = {}
    for name in ("h100", "h200", "l4", "cpu-amx-2core"):
        server = smallest_server(model, load_hardware(name))
        counts[name] = server.devices if server else None
    assert counts == {"h100": 4, "h200": 2, "l4": 8, "cpu-amx-2core": None}


def run(command: Any, out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    code = command([*flags, "--out", str(out)])
    return code, json.loads(out.read_text())


def test_fit_says_how_fast_and_with_what_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card(tmp_path, LLAMA_8B)
    flags = [str(tmp_path), "--hardware", "l4", "--input-tokens", "200", "--output-tokens", "20"]
    code, found = run(fit, tmp_path / "out.json", *flags)
    (row,) = found["hardware"]
    text = capsys.readouterr().out
    assert code == 0 and row["fits"] and row["devices"] == 1
    assert "8.03 billion" in text and "16.06 GB" in text and "131,072 bytes" in text
    assert f"--num-blocks {row['settings']['num_blocks']}" in text
    # One token reads 15 GB of weights at three quarters of 300 GB/s.
    assert row["alone"]["TPOT p50"] == pytest.approx(15.0 / 225 * 1e3, rel=0.05)
    assert row["concurrent"] == row["kv_tokens"] // 32 // 7
    assert row["goodput"]["output tokens/s"] <= 1.1 * row["saturated"]["output tokens/s"]


def test_fit_says_plainly_what_does_not_fit_and_what_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card(tmp_path, LLAMA_70B)
    code, found = run(fit, tmp_path / "out.json", str(tmp_path), "--hardware", "rtx4090",
                      "--devices", "4")  # fmt: skip
    text = capsys.readouterr().out
    assert code == 1 and not found["hardware"][0]["fits"]
    assert "DOES NOT FIT" in text and "GB too little on 4" in text
    assert "--quantization int8 would fit" in text
    assert "2 × NVIDIA H200 SXM" in text


def test_a_plan_lists_the_cheapest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card(tmp_path, LLAMA_8B)
    slo = tmp_path / "slo.yaml"
    slo.write_text("default: {ttft_ms: 3000, tpot_ms: 150}\nshare: 0.9\n")
    flags = [str(TRACE), "--slo", str(slo), "--model", str(tmp_path), "--seconds", "20"]
    names = ("l4", "h100", "cpu-amx-2core")
    machines = [part for name in names for part in ("--hardware", name)]
    code, found = run(plan, tmp_path / "out.json", *flags, *machines)
    assert code == 0
    prices = [row["dollars_per_day"] for row in found["plans"] if "replicas" in row]
    assert len(prices) >= 2 and prices == sorted(prices)
    assert "why_not" in found["plans"][-1]
    assert "a day" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "flags", "named"),
    [
        (fit, ["nowhere"], "nowhere"),
        (fit, ["--hardware", "abacus"], "abacus"),
        (fit, ["--input-tokens", "5000"], "context"),
        (fit, ["--max-model-len", "5000"], "the model's context of 2048"),
        (plan, ["none.csv", "--slo", "none.yaml"], "none.yaml"),
    ],
)
def test_what_cannot_be_is_one_line(
    command: Any, flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(flags) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
