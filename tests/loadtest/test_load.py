"""Arrivals, workloads and the two loops."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from loadtest.arrivals import poisson
from loadtest.events import Outcome
from loadtest.run import closed_loop, open_loop
from loadtest.workloads import Workload

RATE, COUNT = 4.0, 20_000


def gaps(seed: int) -> np.ndarray:
    return np.diff([0.0, *poisson(RATE, COUNT, seed)])


def test_gaps_are_exponential() -> None:
    found = np.sort(gaps(1))
    expected = 1 - np.exp(-RATE * found)
    empirical = np.arange(1, COUNT + 1) / COUNT
    assert np.abs(expected - empirical).max() < 1.63 / COUNT**0.5  # Kolmogorov-Smirnov, 1 %


def test_gaps_are_independent() -> None:
    found = gaps(2)
    correlation = np.corrcoef(found[:-1], found[1:])[0, 1]
    assert abs(correlation) < 3 / COUNT**0.5


def test_counts_in_windows_are_poisson() -> None:
    counts = np.bincount(np.array(poisson(RATE, COUNT, 3), dtype=int))[:-1]
    assert counts.mean() == pytest.approx(RATE, rel=0.03)
    assert counts.var() == pytest.approx(RATE, rel=0.06)


def test_seeds_decide() -> None:
    assert poisson(1.0, 5, 7) == poisson(1.0, 5, 7) != poisson(1.0, 5, 8)


def test_prompts_have_the_asked_length_and_ordinary_ids() -> None:
    pairs = Workload(32, 8, vocab_size=400).generate(50, seed=0)
    assert {len(prompt) for prompt, _ in pairs} == {32}
    assert {output for _, output in pairs} == {8}
    assert all(300 <= int(token) < 400 for prompt, _ in pairs for token in prompt)
    assert len({tuple(prompt) for prompt, _ in pairs}) == 50
    assert pairs == Workload(32, 8, vocab_size=400).generate(50, seed=0)


def test_prefixes_are_shared_within_their_group_only() -> None:
    pairs = Workload(32, 8, prefix_tokens=24, groups=3).generate(60, seed=0)
    assert len({tuple(prompt[:24]) for prompt, _ in pairs}) == 3
    assert len({tuple(prompt[:25]) for prompt, _ in pairs}) > 3
    assert {len(prompt) for prompt, _ in pairs} == {32}


def test_lengths_spread_as_asked() -> None:
    pairs = Workload(100, 50, spread=0.5, prefix_tokens=20, groups=1).generate(2000, seed=0)
    inputs, outputs = {len(p) for p, _ in pairs}, {output for _, output in pairs}
    assert (min(inputs), max(inputs)) == (60, 140)
    assert (min(outputs), max(outputs)) == (25, 75)


def test_words_are_text() -> None:
    ((prompt, _),) = Workload(16, 8, form="words").generate(1, seed=0)
    assert isinstance(prompt, str)
    assert len(prompt.split()) == 16


@pytest.mark.parametrize("wrong", [{"prefix_tokens": 8}, {"vocab_size": 300}])
def test_impossible_workloads_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        Workload(8, 8, **wrong)  # type: ignore[arg-type]


class Target:
    """A stand-in for the client that answers only when told, and counts."""

    def __init__(self, hold_until: int) -> None:
        self.running = self.most = 0
        self._hold_until = hold_until
        self._enough = asyncio.Event()

    async def send(self, message: bytes) -> Outcome:
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running >= self._hold_until:
            self._enough.set()
        await self._enough.wait()
        self.running -= 1
        return Outcome(sent=1.0, ended=2.0, detail=message.decode())


async def test_the_open_loop_waits_for_no_answer() -> None:
    target = Target(hold_until=5)  # a closed loop would wait for ever
    offsets = [0.0, 0.001, 0.001, 0.002, 0.005]
    outcomes = await open_loop(target.send, [b"%d" % i for i in range(5)], offsets)
    assert [o.detail for o in outcomes] == ["0", "1", "2", "3", "4"]
    start = outcomes[0].scheduled
    assert [o.scheduled - start for o in outcomes] == pytest.approx(offsets)
    assert target.most == 5


async def test_the_closed_loop_keeps_its_concurrency() -> None:
    target = Target(hold_until=3)
    outcomes = await closed_loop(target.send, [b"%d" % i for i in range(7)], 3)
    assert [o.detail for o in outcomes] == [str(i) for i in range(7)]
    assert [o.scheduled for o in outcomes] == [1.0] * 7
    assert target.most == 3
