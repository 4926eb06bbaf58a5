"""Arrival processes have the statistics that they promise."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.arrivals import Arrivals

COUNT = 20_000


def times(seed: int = 1, count: int = COUNT, **how: object) -> np.ndarray:
    return np.array(Arrivals(**({"rate": 4.0} | how)).times(count, seed))  # type: ignore[arg-type]


def gaps(**how: object) -> np.ndarray:
    return np.diff(times(**how), prepend=0.0)


def test_constant_gaps_are_equal() -> None:
    assert gaps(gaps="constant") == pytest.approx(np.full(COUNT, 0.25))


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_gaps_have_their_mean_and_variation(cv: float) -> None:
    found = gaps(gaps="gamma", cv=cv)
    assert found.mean() == pytest.approx(0.25, rel=4 * cv / COUNT**0.5)
    assert found.std() / found.mean() == pytest.approx(cv, rel=0.12)


def test_gamma_gaps_of_variation_one_are_exponential() -> None:
    found = np.sort(gaps(gaps="gamma", cv=1.0))
    empirical = np.arange(1, COUNT + 1) / COUNT
    assert np.abs(1 - np.exp(-4 * found) - empirical).max() < 1.63 / COUNT**0.5  # K-S, 1 %


def rates(found: np.ndarray, edges: list[float]) -> np.ndarray:
    return np.histogram(found, edges)[0] / np.diff(edges)


def test_a_step_changes_the_rate_at_its_time() -> None:
    found = rates(times(shape="step:20@300"), [0, 300, 600])
    assert found == pytest.approx([4, 20], rel=0.1)


def test_a_ramp_is_linear_and_then_steady() -> None:
    found = rates(times(shape="ramp:12@800"), [0, 200, 400, 600, 800, 1000])
    assert found == pytest.approx([5, 7, 9, 11, 12], rel=0.1)


def test_a_ramp_downwards_goes_on_at_its_end() -> None:
    found = times(gaps="constant", count=1000, shape="ramp:1@100")
    assert np.all(np.diff(found) > 0)
    assert rates(found, [0, 50, 100, 500]) == pytest.approx([3.25, 1.75, 1], rel=0.05)


def test_a_day_has_its_low_and_its_high() -> None:
    found = times(shape="diurnal:0.5@1000")
    lows = rates(found % 1000, [0, 50, 475, 525, 1000]) / 5  # over five days
    assert lows[0] == pytest.approx(2, rel=0.2)
    assert lows[2] == pytest.approx(6, rel=0.2)
    assert len(found[found < 1000]) == pytest.approx(4000, rel=0.06)


@pytest.mark.parametrize("shape", ["steady", "step:9@2", "ramp:9@20", "diurnal:1@30"])
@pytest.mark.parametrize("process", ["constant", "poisson", "gamma"])
def test_times_ascend_and_follow_the_seed(process: str, shape: str) -> None:
    first = times(5, 500, gaps=process, cv=2.0, shape=shape)
    assert np.all(np.diff(first) >= 0)
    assert list(first) == list(times(5, 500, gaps=process, cv=2.0, shape=shape))
    assert process == "constant" or list(first) != list(times(6, 500, gaps=process, shape=shape))


@pytest.mark.parametrize(
    "how",
    [
        {"rate": 0},
        {"cv": 0},
        {"shape": "wave"},
        {"shape": "step"},
        {"shape": "step:1"},
        {"shape": "step:0@3"},
        {"shape": "ramp:x@3"},
        {"shape": "diurnal:2@3"},
        {"shape": "steady:1@2"},
    ],
)
def test_impossible_processes_are_refused(how: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        times(**how)
