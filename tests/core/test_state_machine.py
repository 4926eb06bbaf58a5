"""Any sequence of calls, on pools small enough to preempt, checked by worker and model."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from batching.core.policy import POLICIES
from batching.core.types import Limits, Request, SamplingParams
from tests.core.harness import Harness

PREFIXES = ([], [1] * 5, [1] * 9, [1, 1, 1, 1, 2, 2, 2, 2, 2])


@st.composite
def small_limits(draw: st.DrawFn) -> Limits:
    return Limits(
        num_blocks=draw(st.sampled_from([5, 8, 16])),
        block_size=draw(st.sampled_from([1, 2, 4])),
        max_sequences=draw(st.sampled_from([1, 3, 6])),
        max_model_len=draw(st.sampled_from([12, 32])),
        max_step_tokens=draw(st.sampled_from([1, 3, 32])),
        inter_token_target=draw(st.sampled_from([0.0, 0.1])),
        policy=draw(st.sampled_from(sorted(POLICIES))),
        prefix_caching=draw(st.booleans()),
        overlap=draw(st.sampled_from([0, 1])),
    )


@st.composite
def any_params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        max_tokens=draw(st.integers(0, 12)),
        stop_token_ids=draw(st.sampled_from([(), (6,)])),
        min_tokens=draw(st.integers(0, 2)),
        prompt_logprobs=draw(st.sampled_from([None, None, 0])),
    )


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(limits=small_limits(), optimistic=st.booleans())
    def start(self, limits: Limits, optimistic: bool) -> None:
        self.harness = self.make_harness(limits)
        if optimistic:
            self.be_optimistic()
        self.added = 0

    def make_harness(self, limits: Limits) -> Harness:
        return Harness(limits)

    def be_optimistic(self) -> None:
        """Admit too many, so that some must be preempted."""
        self.harness.scheduler._residents.output_forecast.share = 0.01

    @rule(
        prefix=st.sampled_from(PREFIXES),
        rest=st.lists(st.integers(0, 2), min_size=1, max_size=3),
        generated=st.sampled_from([0, 0, 0, 2]),
        params=any_params(),
        salt=st.sampled_from([b"", b"", b"x"]),
        rank=st.integers(0, 2),
        seconds=st.sampled_from([None, None, 0.02, 0.1]),
    )
    def add(
        self, prefix: list[int], rest: list[int], generated: int, params: SamplingParams,
        salt: bytes, rank: int, seconds: float | None,
    ) -> None:  # fmt: skip
        harness, prompt = self.harness, [*prefix, *rest]
        deadline = harness.now + 1.0 if rank == 0 else None
        end_by = None if seconds is None else harness.now + seconds
        request = Request(
            id=str(self.added), prompt=prompt, params=params, arrival=harness.now, priority=rank,
            tenant=str(rank), deadline=deadline, end_by=end_by, salt=salt,
            generated=[0] * min(generated, params.max_tokens),
        )  # fmt: skip
        length = len(prompt) + len(request.generated)
        longest = min(len(prompt) + params.max_tokens, harness.limits.max_model_len)
        more = params.max_tokens > len(request.generated)
        blocks = -(-max(length, longest - 1) // harness.limits.block_size)
        possible = (
            length + more <= harness.limits.max_model_len and blocks <= harness.limits.num_blocks
        )
        try:
            harness.add(request)
        except ValueError:
            assert not possible
            harness.scheduler.check_integrity()
        else:
            assert possible
            self.added += 1

    @precondition(lambda self: self.added)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        id = str(data.draw(st.integers(0, self.added - 1)))
        ended = any(event.finish is not None for event in self.harness.events[id])
        assert (self.harness.abort(id) is None) == ended
        assert self.harness.abort(id) is None

    @precondition(lambda self: len(self.harness.results) <= self.harness.limits.overlap)
    @rule()
    def plan(self) -> None:
        self.harness.plan()

    @precondition(lambda self: self.harness.results)
    @rule()
    def commit(self) -> None:
        self.harness.commit()

    @rule(steps=st.integers(1, 8))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.harness.step()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.drain()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=120,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
