"""The cost model: what it learns, what it ignores, and the chunk it allows."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batching.core.cost_model import CostModel, CostState, StepFeatures
from batching.core.types import Coefficients, SequencePlan, StepPlan

FAST = Coefficients(4e-3, 3e-6, 2e-5, 5e-9, 1e-11)
SLOW = Coefficients(3e-2, 4e-4, 1e-3, 4e-7, 3e-8)


def seconds(truth: Coefficients, features: StepFeatures) -> float:
    return sum(
        value * amount
        for value, amount in zip(
            msgspec.structs.astuple(truth), (1, *msgspec.structs.astuple(features)), strict=True
        )
    )


def steps(rng: random.Random, count: int) -> list[StepFeatures]:
    """Mixed steps: decode-only ones, and ones with a prefill chunk."""
    made = []
    for _ in range(count):
        sequences = rng.randrange(1, 64)
        chunk, start = rng.choice([(0, 0), (rng.randrange(1, 2048), rng.randrange(0, 8192))])
        context = sequences * rng.randrange(10, 4000)
        made.append(StepFeatures(chunk, sequences, context, chunk * (2 * start + chunk) // 2))
    return made


def error(model: CostModel, truth: Coefficients, tests: list[StepFeatures]) -> float:
    """Mean relative error."""
    return sum(abs(model.predict(f) / seconds(truth, f) - 1.0) for f in tests) / len(tests)


@pytest.mark.parametrize("truth", [FAST, SLOW])
def test_it_learns_fast_and_slow_machines_through_noise(truth: Coefficients) -> None:
    rng = random.Random(1)
    model = CostModel()
    for features in steps(rng, 300):
        model.update(features, seconds(truth, features) * rng.uniform(0.9, 1.1))
    assert error(model, truth, steps(rng, 100)) < 0.1
    assert model.relative_error < 0.15


@pytest.mark.parametrize("truth", [FAST, SLOW])
def test_a_few_steps_give_the_right_magnitude(truth: Coefficients) -> None:
    rng = random.Random(2)
    model = CostModel()
    for features in steps(rng, 20):
        model.update(features, seconds(truth, features))
    assert error(model, truth, steps(rng, 100)) < 0.5


def test_before_any_data_it_allows_neither_nothing_nor_everything() -> None:
    assert 64 <= CostModel().largest_chunk(0, 0.1, 100_000) < 100_000


@pytest.mark.parametrize("at", [0, 3, 200])
def test_a_stalled_step_does_not_wreck_it(at: int) -> None:
    rng = random.Random(3)
    model = CostModel()
    for number, features in enumerate(steps(rng, 260)):
        factor = 500.0 if number == at else 1.0
        model.update(features, factor * seconds(SLOW, features))
    assert error(model, SLOW, steps(rng, 100)) < 0.1
    model.update(steps(rng, 1)[0], 30.0)
    assert error(model, SLOW, steps(rng, 100)) < 0.2


def test_a_lasting_change_is_followed() -> None:
    rng = random.Random(4)
    model = CostModel()
    for features in steps(rng, 1000):
        model.update(features, seconds(SLOW, features))
    for features in steps(rng, 300):
        model.update(features, 2.0 * seconds(SLOW, features))
    sample = StepFeatures(512, 8, 8192, 131072)
    assert model.predict(sample) > 1.7 * seconds(SLOW, sample)


def test_decode_only_hours_do_not_unlearn_prefill() -> None:
    rng = random.Random(5)
    model = CostModel()
    for features in steps(rng, 300):
        model.update(features, seconds(SLOW, features))
    before = model.coefficients.prefill_token
    for _ in range(5000):
        features = StepFeatures(0, rng.randrange(1, 64), rng.randrange(100, 100_000))
        model.update(features, seconds(SLOW, features) * rng.uniform(0.9, 1.1))
    assert 0.5 < model.coefficients.prefill_token / before < 2.0


@given(
    st.lists(
        st.tuples(
            st.integers(0, 10_000), st.integers(1, 1000), st.integers(0, 10**7),
            st.integers(0, 10**9), st.floats(1e-7, 1e4),
        ),
        max_size=40,
    )
)  # fmt: skip
def test_whatever_it_is_told_it_stays_sane(
    data: list[tuple[int, int, int, int, float]],
) -> None:
    model = CostModel()
    for *features, duration in data:
        model.update(StepFeatures(*features), duration)
        values = msgspec.structs.astuple(model.coefficients)
        assert all(math.isfinite(v) and v >= 0.0 for v in values)
        assert 0.0 <= model.relative_error <= 2.0


@pytest.mark.parametrize("nonsense", [0.0, -1.0, math.nan, math.inf])
def test_nonsense_durations_are_ignored(nonsense: float) -> None:
    model = CostModel()
    before = model.state()
    model.update(StepFeatures(10, 1, 10, 50), nonsense)
    assert model.state() == before


@given(
    start=st.integers(0, 100_000),
    room=st.one_of(st.floats(0.0, 10.0), st.just(math.inf)),
    limit=st.integers(0, 10_000),
    truth=st.builds(Coefficients, *[st.sampled_from([0.0, 1e-9, 1e-6, 1e-4])] * 5),
)
def test_the_largest_chunk_fits_and_one_more_would_not(
    start: int, room: float, limit: int, truth: Coefficients
) -> None:
    model = CostModel(CostState(truth, CostModel().state().covariance, 0.1, 1))
    count = model.largest_chunk(start, room, limit)
    assert 0 <= count <= limit
    if count:
        assert model.chunk_seconds(start, count) <= room * (1 + 1e-9)
    if count < limit:
        assert model.chunk_seconds(start, count + 1) > room * (1 - 1e-9)


def test_features_of_a_plan() -> None:
    plan = StepPlan(0, (), (SequencePlan(0, 99, 1, True), SequencePlan(1, 100, 10, False)))
    assert StepFeatures.of(plan) == StepFeatures(10, 2, 210, 1050)
    chunk = CostModel().chunk_seconds(100, 10)
    alone = StepFeatures(10, 1, 110, 1050)
    assert chunk == pytest.approx(CostModel().predict(alone) - CostModel().coefficients.step)


def test_a_stored_model_continues_where_it_was() -> None:
    rng = random.Random(6)
    model = CostModel()
    for features in steps(rng, 50):
        model.update(features, seconds(SLOW, features))
    stored = msgspec.json.decode(msgspec.json.encode(model.state()), type=CostState)
    twin = CostModel(stored)
    for features in steps(rng, 50):
        model.update(features, seconds(SLOW, features))
        twin.update(features, seconds(SLOW, features))
    assert twin.predict(features) == pytest.approx(model.predict(features), rel=1e-6)
    assert twin.updates == 100
