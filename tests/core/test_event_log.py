"""Recording and replay."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings

from batching.core.event_log import (
    Continued,
    Planned,
    RecordingScheduler,
    ReplayError,
    replay,
    replayed,
)
from batching.core.policy import POLICIES
from batching.core.snapshot import freeze, thaw
from batching.core.types import Limits
from tests.core.harness import Harness, limits, request
from tests.core.test_state_machine import SchedulerMachine


def recorded(limits: Limits, seed: int = 0) -> tuple[list[bytes], Harness]:
    """A run with preemptions, shared prefixes, salts and an abort, and its log."""
    lines: list[bytes] = []
    rng = random.Random(seed)
    run = Harness(
        limits,
        make=lambda limits: RecordingScheduler(limits, write=lines.append),
        seconds=lambda plan: rng.uniform(0.001, 0.1) * plan.token_count,
    )
    for n in range(20):
        prompt = [1] * rng.randrange(9) + [n % 3]
        salt = rng.choice([b"", b"\x00\xff"])
        tenant, priority = str(n % 3), n % 2
        logprobs = rng.choice([None, 0])
        run.add(
            request(str(n), prompt, 16, salt=salt, tenant=tenant, priority=priority,
                    arrival=run.now, prompt_logprobs=logprobs)
        )  # fmt: skip
        run.step()
        if n == 10:
            run.abort(str(n))
    with pytest.raises(ValueError):
        run.add(request("never", []))
    run.drain()
    assert run.scheduler.stats().preemptions > 0
    return lines, run


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_replay_makes_the_same_plans(policy: str, overlap: int) -> None:
    lines, run = recorded(limits(num_blocks=10, policy=policy, overlap=overlap))
    assert list(replay(lines)) == run.plans


def test_another_process_with_another_hash_seed_makes_the_same_plans(tmp_path: Path) -> None:
    lines, run = recorded(limits(num_blocks=10))
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"".join(lines))
    program = (
        "import sys; from batching.core.event_log import replay\n"
        "print(len(list(replay(open(sys.argv[1], 'rb')))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(log)],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(len(run.plans)), done.stderr


def test_a_plan_that_comes_out_differently_is_reported_with_its_line() -> None:
    lines, _ = recorded(limits(num_blocks=10))
    number = next(n for n, line in enumerate(lines) if line.startswith(b'["add"'))
    changed = [*lines[:number], *lines[number + 1 :]]
    with pytest.raises(ReplayError, match=r"line \d+: planned .*, logged"):
        list(replay(changed))


def test_a_log_without_its_start_or_with_garbage_is_refused() -> None:
    lines, _ = recorded(limits(num_blocks=10))
    with pytest.raises(ReplayError, match="line 1: the log does not begin"):
        list(replay(lines[1:]))
    with pytest.raises(ReplayError, match="line 2"):
        list(replay([lines[0], b"{oops\n"]))


class Pieces:
    """A log cut after every few lines. Called as `write`."""

    def __init__(self, lines: int) -> None:
        self.pieces: list[list[bytes]] = [[]]
        self._most = lines

    def __call__(self, line: bytes) -> bool:
        piece = self.pieces[-1]
        piece.append(line)
        if len(piece) <= self._most:  # its first line is extra
            return False
        self.pieces.append([])
        return True


class RecordedMachine(SchedulerMachine):
    """Any history: each piece of its log replays by itself, to the same plans and state."""

    def make_harness(self, limits: Limits) -> Harness:
        self.log = Pieces(lines=3)
        return Harness(limits, make=lambda limits: RecordingScheduler(limits, write=self.log))

    def be_optimistic(self) -> None:
        super().be_optimistic()
        self.log.pieces = [[]]  # a log knows only of what calls do
        scheduler = self.harness.scheduler
        assert isinstance(scheduler, RecordingScheduler)
        scheduler._write(Continued(freeze(scheduler)))

    def teardown(self) -> None:
        super().teardown()
        if not hasattr(self, "harness"):
            return
        plans = []
        for piece in self.log.pieces:
            scheduler = None
            for line, scheduler, _ in replayed(piece):
                scheduler.check_integrity()
                if isinstance(line, Planned) and line.plan is not None:
                    plans.append(line.plan)
        assert plans == self.harness.plans
        assert scheduler is not None
        assert freeze(scheduler) == freeze(self.harness.scheduler)


TestRecordedMachine = RecordedMachine.TestCase
TestRecordedMachine.settings = settings(SchedulerMachine.TestCase.settings, max_examples=30)


def test_a_cut_last_line_is_left_out_and_any_other_is_an_error() -> None:
    lines, run = recorded(limits(num_blocks=10))
    assert list(replay([*lines[:-1], lines[-1][:9]])) == run.plans
    with pytest.raises(ReplayError, match="line 5"):
        list(replay([*lines[:4], lines[4][:9] + b"\n", *lines[5:]]))


@pytest.mark.parametrize(
    "state",
    [
        None,
        ["Scheduler", {"limits": ["subprocess", 1]}],
        ["again", 0],
        ["Sequence", {}],
        ["Sequence", {"no_such_slot": 1}],
        ["Limits", {"num_blocks": "many"}],
        ["policy", "__import__"],
        [1, 2, 3],
    ],
)
def test_what_is_no_state_is_refused(state: object) -> None:
    with pytest.raises(ValueError, match="state"):
        thaw(state)


def test_a_state_is_plain_and_comes_back_equal() -> None:
    _, run = recorded(limits(num_blocks=10, policy="fair", overlap=1))
    run.add(request("more", [1, 2, 3]))
    run.plan()
    state = freeze(run.scheduler)
    again = thaw(msgspec.json.decode(msgspec.json.encode(state)))
    assert freeze(again) == state
    assert again.plan(run.now) == run.scheduler.plan(run.now)
