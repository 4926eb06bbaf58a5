"""Steadiness, courses, promises, comparisons and intervals, on runs worked out by hand."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from loadtest.compare import compare
from loadtest.compare import main as compare_files
from loadtest.events import Outcome
from loadtest.figures import FIGURES, figures, interval
from loadtest.find_rate import find_rate
from loadtest.measure import jain, summarize
from loadtest.scrape import against_server, parse
from loadtest.slo import Limits, Slo, goodput, load_slo, meets
from loadtest.timeline import in_flight, mser, quantiles, steady, timeline


def request(at: float, seconds: float = 1.0, group: str = "all", **changes: Any) -> Outcome:
    """Ten tokens at even times, the first after a tenth."""
    times = [at + seconds * (i + 1) / 10 for i in range(10)]
    fields: dict[str, Any] = {
        "sent": at, "scheduled": at, "ended": at + seconds, "status": 200, "chunk_times": times,
        "input_tokens": 5, "output_tokens": 10, "asked_output": 10, "finish": "length",
        "group": group,
    }  # fmt: skip
    return Outcome(**fields | changes)


def test_the_steady_part_leaves_out_filling_up_and_running_dry() -> None:
    # 4 a second lasting 10 s each: 40 in flight from second 10 to the last sending at 99.75.
    found = steady([request(i / 4, 10.0) for i in range(400)])
    assert found is not None
    assert 5 < found["from"] < 20
    assert found["to"] == 99.75
    assert found["output_tokens_per_second"] == pytest.approx(40, rel=0.03)
    assert found["requests_per_second"] == pytest.approx(4, rel=0.03)
    assert not found["growing"]


def test_an_overload_is_seen() -> None:
    found = steady([request(i / 4, 1 + i / 4) for i in range(400)])
    assert found is not None and found["growing"]
    assert steady([request(0)] * 3) is None


def test_mser_cuts_the_start_only() -> None:
    noise = random.Random(0)
    level = [10 + noise.uniform(-1, 1) for _ in range(60)]
    assert mser([0, 3, 6, 9, *level]) == pytest.approx(3, abs=1)
    assert mser(level) < 15
    assert mser([5.0] * 20) == 0


def test_a_timeline_loses_nothing() -> None:
    outcomes = [request(i / 3) for i in range(90)] + [request(3, error="timeout")]
    rows = timeline(outcomes, 20)
    assert sum(row["sent"] for row in rows) == 91
    assert sum(row["done"] for row in rows) == 90
    width = rows[1]["t"] - rows[0]["t"]
    assert sum(r["output_tokens_per_second"] for r in rows) * width == pytest.approx(900)
    assert rows[10]["in_flight"] == 3
    assert in_flight([request(0, 4.0), request(2, 2.0)], 4) == [1, 1, 2, 2]


def test_quantiles_are_numpys() -> None:
    values = [random.Random(1).gauss(0, 1) for _ in range(101)]
    assert quantiles(values, 10) == pytest.approx(list(np.percentile(values, range(0, 101, 10))))
    assert quantiles([]) == []


SLO = Slo(default=Limits(ttft_ms=150), groups={"slow": Limits(e2e_ms=3000)}, share=0.75)


def test_goodput_counts_requests_that_keep_the_limits_of_their_group() -> None:
    outcomes = [request(0), request(1, 2.0), request(2, 2.0, "slow"), request(3, error="HTTP 500")]
    found = goodput(outcomes, SLO, 4.0)
    assert found["requests_per_second"] == 0.5
    assert found["groups"] == {"all": pytest.approx(1 / 3), "slow": 1.0}
    assert found["share"] == 0.5 and not found["met"]
    assert summarize(outcomes, SLO)["goodput"]["share"] == 0.5


def test_a_run_that_ends_badly_does_not_meet_its_promises() -> None:
    late = [request(i, 1.0 if i < 80 else 9.0) for i in range(100)]
    assert not meets(late, SLO)  # 80 % of all is enough, 60 % of the second half is not
    assert meets([request(i, 1.0 if i % 5 else 9.0) for i in range(100)], SLO)


def test_slo_files(tmp_path: Path) -> None:
    path = tmp_path / "slo.yaml"
    path.write_text("default: {ttft_ms: 150}\ngroups: {slow: {e2e_ms: 3000}}\nshare: 0.75\n")
    assert load_slo(path) == SLO
    for wrong in ("default: {ttft: 1}", "share: 2", "x: 1", "default: {ttft_ms: fast}", "a: b: c"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"slo\.yaml"):
            load_slo(path)


def test_jains_index() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1)
    assert jain([5.0, 0.0]) == pytest.approx(0.5)
    assert jain([0.0, 0.0]) is None
    summary = summarize([request(0, 1.0, "a"), request(0, 1.0, "a"), request(0, 2.0, "b")])
    assert summary["fairness"] == pytest.approx(15**2 / (2 * (10**2 + 5**2)))
    assert summary["groups"]["a"]["requests"] == 2


def test_intervals_are_students() -> None:
    # For 1..5: deviation 1.5811, t(4) = 2.776
    found = interval([1, 2, 3, 4, 5])
    assert found == {"mean": 3.0, "half_width": pytest.approx(2.776 * 1.5811 / 5**0.5, rel=1e-3)}
    assert math.isinf(interval([1.0])["half_width"])


async def test_the_rate_is_bracketed() -> None:
    tried: list[float] = []

    async def probe(rate: float) -> tuple[bool, dict[str, Any]]:
        tried.append(rate)
        return rate <= 13.0, {"TTFT p50": rate}

    found = await find_rate(probe, 2.0)
    assert tried[:4] == [2, 4, 8, 16]
    assert 13 / 1.05 <= found["rate"] <= 13 < found["too_high"] <= 13 * 1.05
    assert [p["rate"] for p in found["probes"]] == sorted(tried)
    none = await find_rate(lambda rate: probe(rate + 100), 2.0)
    assert none["rate"] is None


def result(changes: float = 1.0, errors: int = 0) -> dict[str, Any]:
    summary = summarize([request(i, changes) for i in range(30)])
    return {"summary": summary | {"errors": {"timeout": errors} if errors else {}}}


def verdicts(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["figure"]: row["verdict"] for row in rows}


def test_worse_is_worse_in_the_direction_of_the_figure() -> None:
    slower = verdicts(compare(result(), result(1.5), 5))
    assert slower["TTFT p50"] == slower["E2E p99"] == "worse"
    assert verdicts(compare(result(1.5), result(), 5))["TTFT p50"] == "better"
    assert set(verdicts(compare(result(), result(1.02), 5)).values()) == {"same"}
    assert verdicts(compare(result(), result(errors=1), 5))["errors"] == "worse"


def test_intervals_that_touch_are_no_regression() -> None:
    sure = {"TTFT p50": {"mean": 100.0, "half_width": 5.0}}
    unsure = {"TTFT p50": {"mean": 150.0, "half_width": 60.0}}
    before = result() | {"confidence": sure}
    assert verdicts(compare(before, result(1.5) | {"confidence": unsure}, 5))["TTFT p50"] == "same"
    clear = {"TTFT p50": {"mean": 150.0, "half_width": 9.0}}
    assert verdicts(compare(before, result(1.5) | {"confidence": clear}, 5))["TTFT p50"] == "worse"


def test_the_exit_code_tells_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name, content in {"a": result(), "b": result(2.0), "c": {}}.items():
        paths.append(str(tmp_path / f"{name}.json"))
        Path(paths[-1]).write_bytes(msgspec.json.encode(content))
    a, b, c = paths
    assert compare_files([a, a]) == 0
    assert compare_files([b, a]) == 0
    assert compare_files([a, b]) == 1
    assert "worse" in capsys.readouterr().out
    assert compare_files([a, b, "--tolerance", "500"]) == 0
    assert compare_files([a, c]) == compare_files([a, str(tmp_path)]) == 2


def test_every_figure_is_found_in_a_summary() -> None:
    assert set(figures(summarize([request(0)], SLO))) == set(FIGURES)


def test_metrics_are_summed_over_labels() -> None:
    text = (
        '# HELP a b\nvllm:x{engine="0"} 1.5\nvllm:x{engine="1"} 2\n'
        'vllm:generation_tokens_total{m="a b"} 20.0\nother 1e3\nbad NaNx\n'
    )
    found = parse(text)
    assert found["vllm:x"] == 3.5 and found["other"] == 1000
    assert against_server([request(0), request(1)], {"input": 10, "output": 20}) == {}
    (wrong,) = against_server([request(0)], {"input": 5, "output": 11})
    assert "11 output tokens" in wrong and "10" in wrong
    assert against_server([request(0, error="timeout")], {"input": 1, "output": 1}) == {}
