"""What the scheduler promises, one promise a test. The state machine covers their combinations."""

from __future__ import annotations

import pytest

from batching.core.blocks import IntegrityError
from batching.core.cost_model import CostModel, CostState, StepFeatures
from batching.core.scheduler import Scheduler
from batching.core.types import (
    Coefficients,
    FinishReason,
    Limits,
    SequencePlan,
    StepResult,
    TokenLogprobs,
)
from tests.core.fake_worker import next_token
from tests.core.harness import Harness, expected, limits, request

PER_TOKEN = Coefficients(0.0, 1e-3, 0.0, 0.0, 0.0)  # a millisecond for each prefill token


def priced(limits: Limits, cost: Coefficients = PER_TOKEN) -> Scheduler:
    """A scheduler whose forecasts are known."""
    covariance = tuple((0.0,) * 5 for _ in range(5))
    return Scheduler(limits, CostModel(CostState(cost, covariance, 0.1, 1)))


# -- one request ---------------------------------------------------------------------------------


def test_a_prompt_is_computed_once_and_then_a_token_a_step() -> None:
    run = Harness(limits(prefix_caching=False))
    run.add(request("a", [1, 2, 3, 4, 5], max_tokens=3))
    run.drain()
    shares = [plan.sequences for plan in run.plans]
    assert shares == [
        (SequencePlan(0, 0, 5, True, shares[0][0].new_blocks),),
        (SequencePlan(0, 5, 1, True),),
        (SequencePlan(0, 6, 1, True),),
    ]
    assert [len(plan.inits) for plan in run.plans] == [1, 0, 0]


def test_the_init_is_a_copy_of_what_was_known() -> None:
    run = Harness(limits())
    run.add(request("a", [1, 2, 3], generated=[4]))
    run.drain()
    (init,) = run.plans[0].inits
    assert (init.slot, init.id, init.tokens, init.prompt_length) == (0, "a", [1, 2, 3, 4], 3)


def test_the_first_event_has_the_cached_tokens() -> None:
    run = Harness(limits())
    for name in "ab":
        run.add(request(name, [1] * 9, max_tokens=2))
        run.drain()
    first, last = run.events["b"]
    assert (first.cached_tokens, last.cached_tokens) == (8, None)


def test_a_stop_token_ends_a_request_once_min_tokens_are_there() -> None:
    free, _ = expected(request("x", [3, 1], 12), limits())
    stop = (free[2],)
    assert free.index(free[2]) < 8
    for min_tokens in (0, 2, 8):
        run = Harness(limits())
        run.add(request("a", [3, 1], 12, stop_token_ids=stop, min_tokens=min_tokens))
        run.drain()
        tokens = run.tokens("a")
        stopped = run.events["a"][-1].finish is FinishReason.STOP
        assert stopped == (stop[0] in free[min_tokens:])
        if stopped:
            assert tokens == free[: free.index(stop[0], min_tokens) + 1]


def test_the_context_ends_a_request_as_length() -> None:
    run = Harness(limits(max_model_len=6))
    run.add(request("a", [1, 2, 3], max_tokens=50))
    run.drain()
    assert len(run.tokens("a")) == 3
    assert run.events["a"][-1].finish is FinishReason.LENGTH


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_without_tokens_to_generate_the_prompt_is_still_computed(
    prompt_logprobs: int | None,
) -> None:
    run = Harness(limits(max_step_tokens=4))
    run.add(request("a", [1, 2, 3, 4, 5, 6], 0, prompt_logprobs=prompt_logprobs))
    run.drain()
    assert [plan.token_count for plan in run.plans] == [4, 2]
    assert not any(share.sample for plan in run.plans for share in plan.sequences)
    assert run.events["a"][-1].finish is FinishReason.LENGTH
    assert run.tokens("a") == []


def test_prompt_logprobs_skip_the_cache_but_fill_it() -> None:
    run = Harness(limits())
    for id in "ab":
        run.add(request(id, [1] * 9, 2, prompt_logprobs=0))
        run.drain()
        assert run.events[id][0].cached_tokens == 0
    run.add(request("c", [1] * 9, 2))
    run.drain()
    assert run.events["c"][0].cached_tokens == 8


def test_a_resumed_request_continues_and_counts_what_it_had() -> None:
    whole = request("a", [1, 2, 3], 6)
    tokens, _ = expected(whole, limits())
    run = Harness(limits())
    run.add(request("a", [1, 2, 3], 6, generated=tokens[:4]))
    run.drain()
    assert run.tokens("a") == tokens[4:]


def test_logprobs_go_with_their_tokens() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", [1, 2], 2), 0.0)
    scheduler.add(request("b", [3], 2), 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    entry = TokenLogprobs(8, -0.5, 1)
    events = scheduler.commit(StepResult(plan.step, (7, 8), 0.01, (None, entry)), 0.0)
    assert [(e.tokens, e.logprobs) for e in events] == [((7,), ()), ((8,), (entry,))]


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("a", []), "empty"),
        (request("a", [1] * 64, 1), "exceed the model's context of 64"),
        (request("a", [1] * 8, 40), "12 KV blocks, the pool has 8"),
    ],
)
def test_what_can_never_be_served_is_refused_and_leaves_no_trace(bad: object, message: str) -> None:
    run = Harness(limits(num_blocks=8))
    with pytest.raises(ValueError, match=message):
        run.add(bad)  # type: ignore[arg-type]
    assert not run.scheduler.has_work
    run.add(request("a", [1] * 8, 24))
    run.drain()


def test_a_prompt_of_the_whole_context_can_be_scored() -> None:
    run = Harness(limits())
    run.add(request("a", [1] * 64, 0, prompt_logprobs=0))
    run.drain()


def test_an_id_in_use_is_refused_and_may_be_used_again_afterwards() -> None:
    run = Harness(limits())
    run.add(request("a", [1]))
    with pytest.raises(ValueError, match="exists already"):
        run.add(request("a", [2]))
    run.drain()
    run.add(request("a", [2]))
    run.drain()


@pytest.mark.parametrize(
    "change",
    [{"num_blocks": 0}, {"max_step_tokens": 0}, {"overlap": 2}, {"policy": "lifo"}],
)
def test_impossible_limits_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Scheduler(limits(**change))


def test_plans_and_results_must_alternate() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("a", [1, 2]), 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    with pytest.raises(IntegrityError, match="uncommitted"):
        scheduler.plan(0.0)
    with pytest.raises(IntegrityError, match="not expected"):
        scheduler.commit(StepResult(plan.step + 1, (1,), 0.01), 0.0)
    with pytest.raises(IntegrityError, match="samples 1"):
        scheduler.commit(StepResult(plan.step, (), 0.01), 0.0)
    assert scheduler.commit(StepResult(plan.step, (1,), 0.01), 0.0)[0].tokens == (1,)


# -- the prefix cache ----------------------------------------------------------------------------


def test_requests_that_arrive_together_compute_their_prefix_once() -> None:
    run = Harness(limits())
    for n in range(4):
        run.add(request(str(n), [1] * 8 + [n], 2))
    plan = run.plan()
    assert plan is not None
    assert [(s.start, s.count) for s in plan.sequences] == [(0, 9), (8, 1), (8, 1), (8, 1)]
    tables = [share.new_blocks for share in plan.sequences]
    assert len({table[:2] for table in tables}) == 1
    run.drain()


def test_a_whole_prompt_in_the_cache_still_computes_its_last_token() -> None:
    run = Harness(limits())
    for id in "ab":
        run.add(request(id, [1] * 8, 1))
        run.drain()
    assert [(s.start, s.count) for s in run.plans[-1].sequences] == [(4, 4)]


def test_generated_tokens_are_shared_too() -> None:
    run = Harness(limits())
    run.add(request("a", [1] * 5, 8))
    run.drain()
    run.add(request("b", [1] * 5 + run.tokens("a"), 1))
    run.drain()
    assert run.events["b"][0].cached_tokens == 12


def test_without_prefix_caching_nothing_is_looked_up() -> None:
    run = Harness(limits(prefix_caching=False))
    for id in "ab":
        run.add(request(id, [1] * 9, 1))
        run.drain()
    assert run.events["b"][0].cached_tokens == 0
    assert run.scheduler.stats().prefix_queries == 0


# -- the budget ----------------------------------------------------------------------------------


def test_prefill_alone_takes_the_whole_step() -> None:
    run = Harness(limits(inter_token_target=0.01), make=priced)
    run.add(request("a", [1] * 60, 2))
    plan = run.plan()
    assert plan is not None
    assert plan.token_count == 60


def test_prefill_beside_decodes_stays_within_the_target() -> None:
    run = Harness(limits(inter_token_target=0.0125, stretch=1.0, prefix_caching=False), make=priced)
    run.add(request("a", [1], 30))
    run.step()
    run.add(request("b", [1] * 40, 2))
    counts = []
    while run.tokens("b") == []:
        run.step()
        assert run.plans[-1].sequences[0].count == 1, "a decode waits for a prefill"
        counts.append(run.plans[-1].sequences[1].count)
        features = StepFeatures.of(run.plans[-1])
        assert run.scheduler.cost_model.predict(features) <= 0.0125
    assert counts == [12, 12, 12, 4]
    run.drain()


def test_prefill_may_stretch_a_step_whose_decodes_alone_take_up_the_target() -> None:
    slow = Coefficients(8e-3, 1e-3, 0.0, 0.0, 0.0)
    run = Harness(
        limits(inter_token_target=0.01, stretch=2.0, prefix_caching=False),
        make=lambda limits: priced(limits, slow),
    )
    run.add(request("a", [1], 30))
    run.step()
    run.add(request("b", [1] * 40, 2))
    run.step()
    assert [s.count for s in run.plans[-1].sequences] == [1, 8], "8 ms of decodes, 8 of prefill"
    run.drain()


def test_prefill_progresses_by_a_block_however_tight_the_target() -> None:
    run = Harness(limits(inter_token_target=0.0, stretch=1.0), make=priced)
    run.add(request("a", [1], 30))
    run.step()
    run.add(request("b", [2] * 10, 2))
    run.add(request("c", [3] * 4, 2))
    counts = []
    for _ in range(4):
        run.step()
        counts.append([(s.slot, s.count) for s in run.plans[-1].sequences[1:]])
    assert counts[:3] == [[(1, 4)], [(1, 4)], [(1, 2)]]
    run.drain()


def test_a_more_urgent_arrival_prefills_before_a_long_prompt_goes_on() -> None:
    run = Harness(limits(policy="priority", max_step_tokens=8, prefix_caching=False))
    run.add(request("long", [1] * 40, 2, priority=1))
    run.step()
    run.add(request("urgent", [2] * 8, 2, priority=0))
    run.step()
    assert [init.id for init in run.plans[-1].inits] == ["urgent"]
    assert run.tokens("urgent")
    run.drain()


def test_steps_and_plans_report_what_was_forecast() -> None:
    run = Harness(limits(), make=priced)
    run.add(request("a", [1] * 10, 1))
    run.drain()
    stats = run.scheduler.stats()
    assert stats.predicted_step_seconds == pytest.approx(0.010)
    assert (stats.step_tokens, stats.steps) == (10, 1)
    assert (stats.prompt_tokens, stats.generation_tokens) == (10, 1)


def test_the_fake_model_depends_on_everything_before() -> None:
    # Guards the tests above: a model that forgot its context would forgive wrong KV.
    assert len({next_token([first, *[1] * 6]) for first in range(7)}) > 3
