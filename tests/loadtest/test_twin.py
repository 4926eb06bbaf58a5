"""The twin decides as the engine does, always the same, and at any scale."""

from __future__ import annotations

from collections import deque
from functools import partial
from itertools import pairwise

import msgspec
import pytest

from batching.core.event_log import RecordingScheduler
from batching.core.leap import LeapingScheduler
from batching.core.scheduler import Scheduler
from batching.core.step_time import StepLoad, StepTime
from batching.core.types import Limits, Request, SamplingParams, StepPlan, StepResult
from batching.engine.loop import EngineLoop
from batching.engine.messages import FromEngine, StepOutput, Submit
from batching.worker.protocol import Capabilities
from loadtest.events import Outcome
from loadtest.traces import TraceRequest
from loadtest.twin.calibrate import learn
from loadtest.twin.fleet import Fleet, Job
from loadtest.twin.jobs import trace_jobs
from loadtest.twin.replica import FrontEnd
from loadtest.twin.routing import ROUTERS

LIMITS = Limits(
    num_blocks=400, block_size=16, max_sequences=8, max_model_len=1024, max_step_tokens=256
)
TIME = StepTime((1, 64, 1024), (0.01, 0.02, 0.3), sample=1e-4, context=1e-6, pair=1e-7)
INSTANT = FrontEnd(request=0.0, gather=0.0, reply=0.0)


def trace(count: int = 60, gap: float = 0.05) -> list[TraceRequest]:
    """Prompts of many lengths; every third shares its beginning with others."""
    return [
        TraceRequest(
            i * gap,
            20 + (i * 37) % 200,
            1 + (i * 13) % 30,
            "abc"[i % 3],
            (i % 4, i % 4 + 10) if i % 3 == 0 else (),
            64,
        )
        for i in range(count)
    ]


def fleet(replicas: int = 1, routing: str = "round-robin", **how: object) -> Fleet:
    limits = msgspec.structs.replace(LIMITS, **how)
    return Fleet(limits, TIME, ROUTERS[routing](), replicas, INSTANT)


class VirtualEngine:
    """The real engine loop and scheduler over a worker that only moves the clock."""

    def __init__(self, limits: Limits) -> None:
        self.now = 0.0
        self.free = 0.0
        self.finished: dict[str, float] = {}
        self.arrivals: deque[Request] = deque()
        self._loop = EngineLoop(
            Scheduler(limits), self, self._receive, self._sent, limits.overlap, lambda: self.now
        )

    def capabilities(self) -> Capabilities:
        raise AssertionError("the loop is given its limits and never asks")

    def close(self) -> None:
        pass

    def submit(self, plan: StepPlan) -> tuple[StepPlan, float, float]:
        seconds = TIME.seconds(StepLoad.of(plan))
        self.free = max(self.now, self.free) + seconds
        return plan, seconds, self.free

    def wait(self, handle: tuple[StepPlan, float, float]) -> StepResult:
        plan, seconds, self.now = handle
        return StepResult(plan.step, (1,) * sum(s.sample for s in plan.sequences), seconds)

    def _receive(self, timeout: float) -> list[Submit]:
        if timeout and self.arrivals:  # idle
            self.now = max(self.now, self.arrivals[0].arrival)
        taken = []
        while self.arrivals and self.arrivals[0].arrival <= self.now:
            taken.append(self.arrivals.popleft())
        return [Submit(taken)] if taken else []

    def _sent(self, message: FromEngine) -> None:
        if isinstance(message, StepOutput):
            self.finished |= {e.id: self.now for e in message.events if e.finish is not None}

    def run(self, jobs: list[Job]) -> list[float]:
        for number, job in enumerate(jobs):
            params = SamplingParams(max_tokens=job.output)
            self.arrivals.append(Request(str(number), job.prompt(), params, job.offset))
        while len(self.finished) < len(jobs):
            self._loop.run_once()
        return [self.finished[str(number)] for number in range(len(jobs))]


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("num_blocks", [400, 40])
def test_the_twin_is_the_engine_on_another_clock(overlap: int, num_blocks: int) -> None:
    jobs = trace_jobs(trace())
    twin = fleet(num_blocks=num_blocks, overlap=overlap)
    predicted = [o.ended for o in twin.open_loop(jobs)]
    engine = VirtualEngine(msgspec.structs.replace(LIMITS, num_blocks=num_blocks, overlap=overlap))
    assert predicted == pytest.approx(engine.run(jobs), abs=1e-9)


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("how", [{}, {"num_blocks": 40}, {"max_sequences": 2}])
def test_leaps_over_equal_steps_change_nothing(
    overlap: int, how: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcomes() -> list[object]:
        twin = Fleet(
            msgspec.structs.replace(LIMITS, overlap=overlap, **how),
            TIME,
            ROUTERS["least-loaded"](),
            2,
        )
        opened = twin.open_loop(trace_jobs(trace(60, 0.2)), 0.25)
        closed = twin.closed_loop(trace_jobs(trace()), 5, 0.25)
        busy = [replica.busy_seconds for replica in twin.replicas]
        return [opened, closed, twin.samples, twin.now, busy]

    leapt = outcomes()
    with monkeypatch.context() as patch:
        patch.setattr(LeapingScheduler, "steady_steps", lambda _: 0)
        assert outcomes() == leapt


@pytest.mark.parametrize("routing", list(ROUTERS))
def test_equal_inputs_give_equal_outcomes(routing: str) -> None:
    first, second = (fleet(3, routing).open_loop(trace_jobs(trace())) for _ in range(2))
    assert msgspec.json.encode(first) == msgspec.json.encode(second)


def test_a_fleet_that_keeps_first_and_last_tokens_gives_the_same_but_gaps() -> None:
    def figures(every_token: bool) -> dict[str, object]:
        twin = Fleet(LIMITS, TIME, ROUTERS["round-robin"](), 2, INSTANT, every_token=every_token)
        return twin.summary(twin.open_loop(trace_jobs(trace())))

    whole, ends = figures(True), figures(False)
    assert ends["latency_ms"]["itl"] is None  # type: ignore[index]
    whole["latency_ms"]["itl"] = None  # type: ignore[index]
    for part in whole["groups"].values():  # type: ignore[attr-defined]
        part["latency_ms"]["itl"] = None
    assert whole == ends


@pytest.mark.parametrize("routing", list(ROUTERS))
def test_every_token_is_delivered_once_and_in_order(routing: str) -> None:
    twin = fleet(4, routing, num_blocks=40)  # preempts
    recorded = trace(200, 0.01)
    outcomes = twin.open_loop(trace_jobs(recorded))
    for o, r in zip(outcomes, recorded, strict=True):
        assert (o.input_tokens, o.output_tokens) == (r.input_tokens, r.output_tokens)
        assert len(o.chunk_times) == r.output_tokens
        assert all(a < b for a, b in pairwise([o.scheduled, *o.chunk_times]))
        assert (o.group, o.error, o.ended) == (r.group, None, o.chunk_times[-1])
    for replica in twin.replicas:
        replica.scheduler.check_integrity()
        assert replica.queued_tokens == 0 and not replica.scheduler.has_work


def test_a_closed_loop_keeps_its_concurrency() -> None:
    outcomes = fleet().closed_loop(trace_jobs(trace(40)), 5)
    assert len(outcomes) == 40
    changes = sorted([(o.sent, 1) for o in outcomes] + [(o.ended, -1) for o in outcomes])
    flight = most = 0
    for _, change in changes:
        flight += change
        most = max(most, flight)
    assert most == 5
    lone = fleet().closed_loop(trace_jobs(trace(5)), 1)
    assert all(a.ended < b.sent for a, b in pairwise(lone))


def cached(outcomes: list[Outcome]) -> int:
    return sum(o.cached_tokens or 0 for o in outcomes)


def test_routing_by_prefix_finds_more_in_the_caches() -> None:
    shared = [TraceRequest(i * 0.2, 300, 4, blocks=(i % 7,), block_tokens=256) for i in range(120)]
    by = {name: cached(fleet(6, name).open_loop(trace_jobs(shared))) for name in ROUTERS}
    assert by["prefix-aware"] > 1.1 * by["round-robin"]


def test_routing_by_load_shortens_the_tail() -> None:
    uneven = [TraceRequest(i * 0.06, 900 if i % 4 == 0 else 20, 20) for i in range(160)]

    def worst(name: str) -> float:
        outcomes = fleet(4, name).open_loop(trace_jobs(uneven))
        return sorted(o.ended - o.scheduled for o in outcomes)[-16]

    assert worst("least-loaded") < 0.8 * worst("round-robin")


def test_what_cannot_be_served_is_refused_with_its_reason() -> None:
    jobs = [Job(partial(list, [1] * 2000), 5), Job(partial(list, [1] * 20), 5)]
    refused, served = fleet().open_loop(jobs)
    assert refused.error == "HTTP 400" and "context" in refused.detail
    assert served.error is None


def test_the_front_end_hands_over_what_came_together() -> None:
    twin = Fleet(LIMITS, TIME, ROUTERS["round-robin"](), 1, FrontEnd(0.002, 0.001, 0.004))
    jobs = [Job(partial(list, [i] * 20), 1) for i in range(3)]
    step = TIME.seconds(StepLoad(60, 3, 0, 600))
    ends = [o.ended for o in twin.open_loop(jobs)]
    assert ends == pytest.approx([0.001 + 3 * 0.002 + step + 0.004] * 3)


def test_a_calibration_finds_the_times_that_made_the_diary() -> None:
    log: list[bytes] = []
    now, batches, number = 0.0, [], 0
    scheduler = RecordingScheduler(LIMITS, write=log.append)
    sizes = [(64, 4), (64, 1)] + [(1 + i * 29 % 200, 1 + i % 12) for i in range(90)]
    for turn in range(30):
        batch = []
        for size in sizes[3 * turn : 3 * turn + 1 + turn % 3]:
            number += 1
            prompt = [number] * size[0]
            params = SamplingParams(max_tokens=size[1])
            scheduler.add(Request(str(number), prompt, params, now), now + 0.003)
            batch.append(Outcome(sent=now, ended=now))
        now += 0.003
        first = True
        while (plan := scheduler.plan(now)) is not None:
            seconds = TIME.seconds(StepLoad.of(plan))
            now += seconds
            tokens = (1,) * sum(s.sample for s in plan.sequences)
            scheduler.commit(StepResult(plan.step, tokens, seconds), now)
            if first and len(batch) == 1 and tokens:
                batch[0].chunk_times.append(now + 0.002)
                first = False
        now += 1.0
        batches.append(batch)
    found = learn(log, batches)
    assert found.limits == LIMITS
    assert found.error < 0.02
    for load in (StepLoad(1, 1, 50, 0), StepLoad(4, 4, 400, 0), StepLoad(150, 1, 0, 11250)):
        assert found.step_time.seconds(load) == pytest.approx(TIME.seconds(load), rel=0.05)
    assert found.front.reply == pytest.approx(0.002, rel=0.01)
    assert found.front.request + found.front.gather == pytest.approx(0.003, rel=0.01)
