"""`slipstream replay FILE`: make the decisions of a server again, from its event log.

FILE is what --event-log named; its older pieces FILE.1, FILE.2, … are read first.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from batching.core.event_log import Planned, Replayed, ReplayError, replayed
from batching.core.timeline import Timelines
from batching.engine.log_ring import ring
from config.flags import OneLineParser


def main(arguments: Sequence[str]) -> int:
    """Replay and report. Returns 0, 1 if a plan comes out differently, 2 for wrong usage."""
    parser = OneLineParser(
        prog="slipstream replay", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--request", metavar="ID", help="tell what happened to this request")
    options = parser.parse_args(arguments)
    try:
        pieces = ring(options.file)[::-1]
        if not pieces:
            parser.error(f"there is no {options.file}")
        timelines = None if options.request is None else Timelines(options.request)
        same = [_replay(piece, timelines) for piece in pieces]
    except OSError as error:
        parser.error(f"cannot read {options.file}: {error}")
    if timelines is not None:
        _tell(timelines, options.request)
    return 0 if all(same) else 1


def _replay(piece: Path, timelines: Timelines | None) -> bool:
    """Replay one piece and say how it went. Returns whether all plans were those logged."""
    steps: list[int] = []
    verdict = "the same"
    try:
        for line in _read(piece):
            if isinstance(line.line, Planned) and line.line.plan is not None:
                steps.append(line.line.plan.step)
            if timelines is not None:
                timelines.read(line)
    except ReplayError as error:
        verdict = f"the same, then not: {error}"
    if verdict == "the same" and not _is_whole(piece):
        print(f"{piece.name}: the last line was cut off, and is left out")
    which = f"steps {steps[0]} to {steps[-1]}: " if steps else ""
    print(f"{piece.name}: {which}{len(steps)} plans, {verdict}")
    return verdict == "the same"


def _read(piece: Path) -> Iterator[Replayed]:
    with piece.open("rb") as lines:
        yield from replayed(lines)


def _is_whole(piece: Path) -> bool:
    """Whether the last line has its end: a crash can cut it off."""
    with piece.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


def _tell(timelines: Timelines, name: str) -> None:
    if not timelines.lines:
        print(f"no request {name} in this log", file=sys.stderr)
    for id, lines in timelines.lines.items():
        print(f"\nrequest {id}")
        print("\n".join(lines))
