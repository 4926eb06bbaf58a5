"""The future-peak estimate and the forecast of outputs."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from batching.core.admission import OutputForecast, future_peak


def simulated_peak(sequences: list[tuple[int, int]]) -> int:
    """Let all grow a block a moment, leave when grown, and watch the sum."""
    peak = sum(owned for _, owned in sequences)
    for moment in range(1, max((growth for growth, _ in sequences), default=0) + 1):
        peak = max(peak, sum(owned + moment for growth, owned in sequences if growth >= moment))
    return peak


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_the_peak_is_that_of_a_simulation(sequences: list[tuple[int, int]]) -> None:
    assert future_peak(sequences) == simulated_peak(sequences)


def test_staggered_ends_peak_below_the_sum_of_ends() -> None:
    sequences = [(1, 10), (10, 1)]
    assert future_peak(sequences) == 13
    assert sum(growth + owned for growth, owned in sequences) == 22


def test_the_forecast_settles_on_the_quantile() -> None:
    forecast = OutputForecast()
    for number, _ in product(range(10), range(60)):
        forecast.finished(generated=number + 1, allowed=100)
    settled = []
    for number in list(range(10)) * 20:
        forecast.finished(generated=number + 1, allowed=100)
        settled.append(forecast.share)
    # Outputs are 1 … 10 % of what is allowed: the 80 % quantile is 8 %.
    assert 0.06 < sum(settled) / len(settled) < 0.11


def test_a_preemption_raises_the_forecast_at_once() -> None:
    forecast = OutputForecast(0.4)
    forecast.preempted()
    assert forecast.share == 0.5
    for _ in range(10):
        forecast.preempted()
    assert forecast.share == 1.0


def test_something_is_always_expected_but_never_more_than_allowed() -> None:
    assert OutputForecast(0.01).remaining(5) == 1
    assert OutputForecast(1.0).remaining(5) == 5
    assert OutputForecast(0.5).remaining(0) == 0


def test_requests_that_may_generate_nothing_teach_nothing() -> None:
    forecast = OutputForecast(0.5)
    forecast.finished(0, 0)
    assert forecast.share == 0.5
