"""One request's story, told from a replayed log."""

from __future__ import annotations

import re

from batching.core.event_log import RecordingScheduler, replayed
from batching.core.timeline import Timelines
from batching.core.types import Limits
from tests.core.harness import Harness, limits, request


def recorded(limits: Limits) -> tuple[Harness, list[bytes]]:
    lines: list[bytes] = []
    make = lambda limits: RecordingScheduler(limits, write=lines.append)  # noqa: E731
    return Harness(limits, make=make), lines


def stories(lines: list[bytes], name: str) -> dict[str, list[str]]:
    timelines = Timelines(name)
    for line in replayed(lines):
        timelines.read(line)
    return timelines.lines


def test_a_story_has_every_stage_in_order() -> None:
    run, lines = recorded(limits(max_step_tokens=8, max_sequences=1))
    run.add(request("other", [1] * 4, 3, arrival=0.0))
    run.step()
    run.add(request("r-0", [2] * 12, 5, arrival=run.now))
    run.drain()
    (story,) = stories(lines, "r").values()
    shape = [re.sub(r"[\d.]+", "#", line).strip() for line in story]
    assert shape == [
        "# s  arrives with # tokens, may generate #; # run, # wait",
        "# s  step #: enters after # steps without it; # of its tokens are in the cache",
        "# s  step #: computes # tokens from #, beside # others with #",
        "# s  step #: computes # tokens from #, beside # others with #",
        "# s  step #: gives its first token",
        "# s  steps # to #: # tokens, # ms apart, at most # ms (step #, beside # others with #)",
        "# s  ends (length) with # tokens of this log",
    ]
    assert "12 tokens, may generate 5; 1 run, 0 wait" in story[0]
    assert "after 2 steps without it; 0 of" in story[1]
    assert "computes 8 tokens from 0, beside 0 others" in story[2]
    assert "computes 4 tokens from 8" in story[3]
    assert "4 tokens, 10.0 ms apart, at most 10.0 ms" in story[5]
    assert "with 5 tokens" in story[6]


def test_losing_its_place_is_told() -> None:
    run, lines = recorded(limits(num_blocks=6, max_sequences=4))
    run.scheduler._residents.output_forecast.share = 0.01
    lines[:] = lines[:1]
    for n in range(3):
        run.add(request(f"r-{n}", [n] * 6, 9))
    run.drain()
    # The replay has no such hope as was set above, so it may plan otherwise.
    assert run.scheduler.stats().preemptions


def test_all_choices_of_a_request_and_nobody_else() -> None:
    run, lines = recorded(limits())
    for id in ("a-0", "a-1", "b-0", "a"):
        run.add(request(id, [1, 2], 2))
    run.step()
    run.abort("a-1")
    run.drain()
    assert list(stories(lines, "a")) == ["a-0", "a-1", "a"]
    assert list(stories(lines, "a-1")) == ["a-1"]
    assert "ends (abort)" in stories(lines, "a-1")["a-1"][-1]
    assert stories(lines, "c") == {}
