"""Tenants share the engine: whoever asks for ten times as much waits for itself."""

from __future__ import annotations

from statistics import median

import pytest

from batching.core.types import Limits
from tests.core.harness import Harness, limits, request
from tests.core.simulation import Simulation, poisson

SECONDS = 30.0


def median_wait(
    policy: str, rate: float, slots: int, prompt: range, output: range, flood: float
) -> float:
    """Of a tenant's times to first token, beside one that asks for `flood` times as much."""
    bounds = Limits(
        num_blocks=4000, block_size=16, max_sequences=slots, max_model_len=4096,
        max_step_tokens=2048, policy=policy,
    )  # fmt: skip
    requests = list(poisson(rate, SECONDS, prompt, output, "modest"))
    if flood:
        longer = range(output.start, 4 * output.stop)
        requests += poisson(flood * rate, SECONDS, prompt, longer, "greedy")
    simulation = Simulation(bounds, requests)
    simulation.run(watched="modest")
    waits = [wait for id, wait in simulation.waits.items() if id.startswith("modest")]
    assert len(waits) > 40
    return median(waits)


@pytest.mark.parametrize(
    ("rate", "slots", "prompt", "output"),
    [
        (2.0, 16, range(200, 800), range(20, 200)),
        (4.0, 64, range(200, 800), range(20, 200)),
        (2.0, 16, range(1000, 2000), range(50, 100)),  # long prompts
        (2.0, 16, range(20, 100), range(100, 400)),  # long answers: every slot is taken
    ],
)
def test_ten_times_the_load_of_another_leaves_a_tenants_median_within_twice(
    rate: float, slots: int, prompt: range, output: range
) -> None:
    alone = median_wait("fair", rate, slots, prompt, output, flood=0)
    assert median_wait("fair", rate, slots, prompt, output, flood=10) <= 2 * alone
    unfair = median_wait("fcfs", rate, slots, prompt, output, flood=10)
    assert unfair > 20 * alone, "the flood is one"


# -- slots ---------------------------------------------------------------------------------------


def fair(**changes: object) -> Harness:
    return Harness(limits(policy="fair", max_sequences=4, **changes))


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_tenant_without_a_slot_gets_one_of_who_has_many(overlap: int) -> None:
    run = fair(overlap=overlap)
    for n in range(6):
        run.add(request(f"greedy{n}", [1, n], 30, tenant="greedy", arrival=float(n)))
    for _ in range(5):
        run.step()
    run.add(request("modest", [2, 2], 4, tenant="modest", arrival=9.0))
    for _ in range(2 + 2 * overlap):
        run.step()
    assert run.tokens("modest"), "it did not wait for thirty tokens"
    assert run.scheduler.stats().preemptions == 1
    run.drain()


def test_the_newest_goes_and_returns_before_those_that_never_ran() -> None:
    run = fair()
    for n in range(6):
        run.add(request(f"greedy{n}", [1, n], 20, tenant="greedy", arrival=float(n)))
    run.step()
    run.add(request("modest", [2, 2], 4, tenant="modest", arrival=9.0))
    run.drain()
    begun = [init.id for plan in run.plans for init in plan.inits]
    assert begun[:4] == [f"greedy{n}" for n in range(4)]
    assert begun[4:6] == ["modest", "greedy3"]


def test_slots_are_not_taken_to_and_fro() -> None:
    run = fair()
    for n in range(8):
        for tenant in ("a", "b", "c"):
            id = f"{tenant}{n}"
            run.add(request(id, [n], 12, tenant=tenant, arrival=float(n)))
            run.step()
    run.drain()
    assert run.scheduler.stats().preemptions < 24 // 3


def test_without_tenants_nobody_is_preempted_for_a_slot() -> None:
    for policy in ("fcfs", "fair", "priority", "deadline"):
        run = Harness(limits(policy=policy, max_sequences=2))
        for n in range(6):
            run.add(request(str(n), [n], 12, arrival=float(n)))
        run.drain()
        assert run.scheduler.stats().preemptions == 0
