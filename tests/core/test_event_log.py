"""Recording and replay."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from batching.core.event_log import RecordingScheduler, ReplayError, replay
from batching.core.policy import POLICIES
from batching.core.types import Limits
from tests.core.harness import Harness, limits, request


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
