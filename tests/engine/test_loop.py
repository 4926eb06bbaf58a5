"""The loop tells its supervisor enough: every step is a heartbeat, and long ones are announced."""

from __future__ import annotations

import pytest

from batching.core.scheduler import Scheduler
from batching.core.types import Limits, Request, SamplingParams
from batching.engine.loop import EngineLoop
from batching.engine.messages import FromEngine, Starting, StepOutput, Submit
from batching.worker.protocol import Capabilities
from batching.worker.simulated import SimulatedWorker, StepCost


class Bench:
    """A loop whose messages are collected, and whose worker takes virtual time."""

    def __init__(self, cost: StepCost) -> None:
        caps = Capabilities("m", "simulated", 100, 256, 64, 16, 8, 32, "none", "none", "none")
        limits = Limits(64, 16, 8, 256, 32)
        self.now = 0.0
        self.patience = 0.0  # how long an idle loop waits for requests
        self.inbox: list[Submit] = []
        self.sent: list[FromEngine] = []
        worker = SimulatedWorker(caps, cost, self.advance)
        self.loop = EngineLoop(
            Scheduler(limits), worker, self.receive, self.sent.append, clock=lambda: self.now
        )

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def receive(self, timeout: float) -> list[Submit]:
        submits, self.inbox = self.inbox, []
        self.now += min(timeout, self.patience)
        return submits

    def run(self, steps: int) -> list[FromEngine]:
        """What is sent in so many turns."""
        self.sent.clear()
        for _ in range(steps):
            self.loop.run_once()
        return list(self.sent)

    def submit(self, name: str, prompt: int) -> None:
        request = Request(name, [1] * prompt, SamplingParams(max_tokens=40), self.now)
        self.inbox.append(Submit([request]))


def test_every_step_and_every_idle_second_is_a_heartbeat() -> None:
    bench = Bench(StepCost(fixed=0.01))
    assert [type(m) for m in bench.run(2)] == [StepOutput, StepOutput]
    bench.submit("long", prompt=128)
    outputs = [m for m in bench.run(8) if isinstance(m, StepOutput)]
    assert len(outputs) == 8
    assert [bool(o.events) for o in outputs][:3] == [False] * 3  # chunks of the prompt


def test_all_time_is_booked_to_a_stage() -> None:
    bench = Bench(StepCost(fixed=0.01))
    bench.submit("a", prompt=4)
    bench.run(5)
    (last,) = bench.run(1)
    assert isinstance(last, StepOutput)
    assert last.stats.wait_seconds + last.stats.submit_seconds == pytest.approx(0.06)
    assert last.stats.idle_seconds == 0.0


def test_waiting_for_work_is_idle() -> None:
    bench = Bench(StepCost(fixed=0.01))
    bench.patience = 1.0
    (output, *_, last) = bench.run(3)
    assert isinstance(output, StepOutput) and isinstance(last, StepOutput)
    assert (output.stats.idle_seconds, last.stats.idle_seconds) == (1.0, 3.0)
    assert last.stats.wait_seconds == last.stats.plan_seconds == 0.0


def test_a_step_that_takes_up_a_request_is_announced() -> None:
    bench = Bench(StepCost(fixed=0.01))
    bench.submit("a", prompt=4)
    first, output = bench.run(1)
    assert isinstance(first, Starting) and isinstance(output, StepOutput)
    assert (first.step, first.admitted, first.familiar) == (0, ["a"], False)
    bench.run(9)
    assert not any(isinstance(m, Starting) for m in bench.run(5))
    bench.submit("b", prompt=4)
    (announced,) = [m for m in bench.run(2) if isinstance(m, Starting)]
    assert announced.admitted == ["b"]


@pytest.mark.parametrize("seconds", [0.5, 10.0, 30.0])
def test_the_steps_of_a_slow_model_are_announced_as_such(seconds: float) -> None:
    bench = Bench(StepCost(fixed=seconds))
    bench.submit("a", prompt=4)
    announced = [m for m in bench.run(30) if isinstance(m, Starting)]
    assert [m.familiar for m in announced] == [False] * 2 + [True] * 28
    assert all(seconds <= m.seconds < 2 * seconds for m in announced[1:])
