"""Step times: interpolation, and fits that recover what made the samples."""

from __future__ import annotations

import random

import pytest

from batching.core.step_time import StepLoad, StepTime, fit, relative_error
from batching.core.types import SequencePlan, StepPlan

TRUTH = StepTime((1, 16, 256), (0.01, 0.012, 0.09), sample=2e-4, context=1e-6, pair=3e-8)
KNOTS = (1, 4, 16, 64, 256, 1024)


def loads(seed: int = 0, count: int = 300) -> list[StepLoad]:
    source = random.Random(seed)
    found = []
    for _ in range(count):
        rows = round(256 ** source.random())
        decodes = source.randint(0, min(rows, 40))
        pairs = (rows - decodes) * source.randint(1, 2000)
        found.append(StepLoad(rows, decodes + (pairs > 0), decodes * source.randint(1, 900), pairs))
    return found


def test_the_load_of_a_plan() -> None:
    decode, prefill = SequencePlan(0, 99, 1, True), SequencePlan(1, 32, 10, False)
    plan = StepPlan(0, (), (decode, prefill, SequencePlan(2, 0, 4, True)))
    assert StepLoad.of(plan) == StepLoad(15, 2, 100, 10 * (64 + 10) // 2 + 8)


def test_the_curve_is_linear_between_knots_and_goes_on_after() -> None:
    curve = StepTime((1, 11, 21), (1.0, 2.0, 4.0))
    times = [curve.seconds(StepLoad(rows, 0, 0, 0)) for rows in (1, 6, 11, 16, 21, 31)]
    assert times == pytest.approx([1, 1.5, 2, 3, 4, 6])


def test_a_fit_recovers_what_made_the_samples() -> None:
    samples = [(load, TRUTH.seconds(load)) for load in loads()]
    found = fit(samples, KNOTS)
    fresh = [(load, TRUTH.seconds(load)) for load in loads(1)]
    assert relative_error(found, fresh) < 0.01
    assert found.sample == pytest.approx(TRUTH.sample, rel=0.1)
    assert found.pair == pytest.approx(TRUTH.pair, rel=0.1)


def test_noise_is_averaged_and_nothing_is_negative() -> None:
    source = random.Random(3)
    noisy = [(load, TRUTH.seconds(load) * source.gauss(1, 0.1)) for load in loads()]
    found = fit(noisy, KNOTS)
    fresh = [(load, TRUTH.seconds(load)) for load in loads(1)]
    assert relative_error(found, fresh) < 0.05
    assert min(*found.curve, found.sample, found.context, found.pair) >= 0


def test_knots_without_samples_are_dropped() -> None:
    samples = [(StepLoad(rows, 1, rows, 0), rows / 100) for rows in (1, 2, 3, 4, 200, 256) * 5]
    found = fit(samples, KNOTS)
    assert 16 not in found.knots
    assert found.seconds(StepLoad(100, 1, 100, 0)) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_too_few_samples_fit_nothing(count: int) -> None:
    with pytest.raises(ValueError, match="too few"):
        fit([(StepLoad(1 + i, 1, 1, 0), 1.0) for i in range(count)], KNOTS)
