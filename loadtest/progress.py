"""A line or two on the terminal while a run is under way. Nothing where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType

from loadtest.events import Outcome

_RECENT = 200  # requests whose TTFT is shown


class Progress:
    """`seen` is called with each outcome; the display costs the client a few redraws a second."""

    def __init__(self, total: int, title: str, shown: bool | None = None) -> None:
        self._total, self._title = total, title
        self._began = time.perf_counter()
        self._done = self._failed = self._tokens = 0
        self._ttft: deque[float] = deque(maxlen=_RECENT)
        self._live: _Live | None = None
        if sys.stderr.isatty() if shown is None else shown:
            self._live = _Live(self)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def seen(self, outcome: Outcome) -> None:
        """Count one request that ended."""
        self._done += 1
        self._failed += outcome.error is not None
        self._tokens += outcome.output_tokens or 0
        if outcome.chunk_times:
            self._ttft.append(outcome.chunk_times[0] - outcome.scheduled)

    def text(self) -> str:
        """What is shown now."""
        seconds = max(1e-9, time.perf_counter() - self._began)
        recent = sorted(self._ttft)
        ttft = f", TTFT p50 {recent[len(recent) // 2] * 1e3:,.0f} ms" if recent else ""
        failed = f", [red]{self._failed} failed[/red]" if self._failed else ""
        return (
            f"[bold]{self._title}[/bold]  {self._done}/{self._total} in {seconds:.0f} s{failed}, "
            f"{self._tokens / seconds:,.0f} tokens/s{ttft}"
        )


class _Live:
    """rich's live display, redrawn four times a second from a thread of its own."""

    def __init__(self, progress: Progress) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        def draw() -> Text:
            return Text.from_markup(progress.text())

        self._live = Live(
            console=Console(stderr=True, force_terminal=True),
            get_renderable=draw,
            refresh_per_second=4,
            transient=True,
        )

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()
