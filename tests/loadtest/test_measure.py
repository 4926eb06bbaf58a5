"""Percentiles against numpy, and figures of runs that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.events import Outcome
from loadtest.measure import client_warnings, disagreements, distribution, percentile, summarize

FINITE = st.floats(-1e6, 1e6)


@given(st.lists(FINITE, min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    ours = percentile(sorted(values), percent)
    assert ours == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-6)


@given(st.lists(FINITE, min_size=1, max_size=50))
def test_distributions_are_numpys(values: list[float]) -> None:
    figures = distribution(values)
    assert figures is not None
    assert figures["mean"] == pytest.approx(float(np.mean(values)), rel=1e-9, abs=1e-6)
    assert (figures["min"], figures["max"], figures["count"]) == (
        min(values),
        max(values),
        len(values),
    )


def outcome(**changes: object) -> Outcome:
    fields: dict[str, object] = {
        "scheduled": 10.0,
        "sent": 10.5,
        "ended": 13.0,
        "status": 200,
        "chunk_times": [11.0, 12.0],
        "input_tokens": 5,
        "output_tokens": 3,
        "asked_input": 5,
        "asked_output": 3,
        "finish": "length",
    }
    return Outcome(**(fields | changes))  # type: ignore[arg-type]


def test_failed_requests_count_as_errors_and_nothing_else() -> None:
    failed = outcome(error="HTTP 429", chunk_times=[], output_tokens=99, ended=14.0, detail="full")
    summary = summarize([outcome(), outcome(), failed])
    assert summary["requests"] == {"sent": 3, "completed": 2}
    assert summary["errors"] == {"HTTP 429": 1}
    assert summary["error_examples"] == {"HTTP 429": "full"}
    assert summary["seconds"] == 4.0
    assert summary["throughput"] == {
        "requests_per_second": 0.5,
        "output_tokens_per_second": 1.5,
        "total_tokens_per_second": 4.0,
    }
    assert summary["latency_ms"]["tpot"]["p99"] == 500.0
    assert summary["latency_ms"]["e2e"]["count"] == 2


def test_a_run_of_failures_has_no_latencies() -> None:
    summary = summarize([outcome(error="timeout")])
    assert set(summary["latency_ms"].values()) == {None}
    assert client_warnings(summary, 0.1) == []


def test_no_outcomes_is_no_result() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        summarize([])


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"output_tokens": None}, "no usage"),
        ({"output_tokens": 1, "finish": "stop"}, "more events with text than tokens"),
        ({"chunk_times": []}, "tokens but no text"),
        ({"asked_output": 2}, "more tokens than asked for"),
        ({"asked_output": 4}, "finish is length before the limit"),
        ({"asked_input": 6}, "prompt tokens differ from those sent"),
    ],
)
def test_usage_that_contradicts_the_stream_is_reported(
    changes: dict[str, object], kind: str
) -> None:
    assert disagreements([outcome(), outcome(**changes)]) == {kind: 1}


def test_a_late_or_busy_client_is_reported() -> None:
    punctual, late = outcome(sent=10.001), outcome(sent=10.9)
    assert client_warnings(summarize([punctual]), 0.5) == []
    assert "late" in client_warnings(summarize([late]), 0.5)[0]
    assert "bottleneck" in client_warnings(summarize([punctual]), 0.9)[0]
