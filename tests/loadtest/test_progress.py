"""What the terminal shows during a run."""

from __future__ import annotations

import pytest

from loadtest.events import Outcome
from loadtest.progress import Progress


def test_the_line_counts_what_was_seen() -> None:
    with Progress(4, "a model", shown=False) as progress:
        progress.seen(Outcome(0.0, 1.0, chunk_times=[0.25], output_tokens=7))
        progress.seen(Outcome(0.0, 1.0, chunk_times=[0.75], output_tokens=3))
        progress.seen(Outcome(0.0, 1.0, error="timeout"))
    text = progress.text()
    assert "a model" in text and "3/4" in text and "1 failed" in text
    assert "TTFT p50 750 ms" in text


def test_it_is_drawn_on_a_terminal_and_nowhere_else(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress(1, "hidden") as progress:  # standard error is no terminal here
        progress.seen(Outcome(0.0, 1.0))
    assert capfd.readouterr().err == ""
    with Progress(1, "shown", shown=True) as progress:
        progress.seen(Outcome(0.0, 1.0))
    assert "shown" in capfd.readouterr().err
