"""The ring on disk: bounded, private, whole after any number of crashes, and never in the way."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from batching.core.event_log import Planned, RecordingScheduler, replay, replayed
from batching.engine import log_ring
from batching.engine.log_ring import LogRing, ring
from tests.core.harness import Harness, limits, request


def engine(recorder: LogRing, requests: int) -> Harness:
    """One engine's life, recorded."""
    run = Harness(
        limits(num_blocks=16),
        make=lambda limits: RecordingScheduler(limits, write=recorder.write),
    )
    for n in range(requests):
        run.add(request(str(n), [1] * (1 + n % 7), 12, salt=bytes([n % 3])))
        for _ in range(4):
            run.step()
    return run


def plans(pieces: list[Path]) -> list[object]:
    return [p for piece in pieces for p in replay(piece.read_bytes().splitlines(keepends=True))]


def test_the_ring_stays_within_its_size_and_each_piece_replays(tmp_path: Path) -> None:
    path, size = tmp_path / "events", 64 << 10
    recorder = LogRing(path, size)
    run = engine(recorder, 400)
    pieces = ring(path)
    assert len(pieces) >= 4
    assert sum(piece.stat().st_size for piece in pieces) <= size
    assert {piece.stat().st_mode & 0o777 for piece in pieces} == {0o600}
    found = plans(pieces[::-1])
    assert len(found) > 50
    assert found == run.plans[-len(found) :]


def test_engines_that_die_leave_their_log_and_old_ones_go_first(tmp_path: Path) -> None:
    path = tmp_path / "events"
    lives = [engine(LogRing(path, 1 << 20), 3).plans for _ in range(4)]
    pieces = ring(path)
    assert [piece.name for piece in pieces] == ["events", "events.1", "events.2", "events.3"]
    assert [plans([piece]) for piece in pieces] == lives[::-1]
    for _ in range(120):
        LogRing(path, 1 << 20)
    assert len(list(tmp_path.iterdir())) == 100
    engine(LogRing(path, 8 << 10), 3)
    assert len(plans(ring(path))) == len(lives[0])


def test_files_that_only_look_alike_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "events"
    others = ["events.2026", "events.0", "events.1.gz", "xevents", "events.old"]
    for name in others:
        (tmp_path / name).write_text("precious")
    for _ in range(3):
        LogRing(path, 1 << 10)
    assert len(ring(path)) == 3
    assert [(tmp_path / name).read_text() for name in others] == ["precious"] * len(others)


def test_what_cannot_be_written_ends_the_recording_not_the_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine(LogRing(Path("/dev/full/events"), 1 << 20), 5).drain()
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1


def test_a_full_disk_ends_the_recording_with_whole_lines(tmp_path: Path) -> None:
    recorder = LogRing(tmp_path / "events", 1 << 20)
    run = engine(recorder, 3)
    recorded = len(run.plans)
    recorder._file = Path("/dev/full").open("wb")  # noqa: SIM115  # every write fails
    run.drain()
    assert len(run.plans) > recorded == len(plans(ring(tmp_path / "events")))


def test_a_piece_that_begins_in_the_middle_has_all_that_went_before(tmp_path: Path) -> None:
    path = tmp_path / "events"
    run = engine(LogRing(path, 64 << 10), 200)
    for piece in ring(path)[:-1]:
        first, *_ = piece.read_bytes().splitlines(keepends=True)
        ((line, scheduler, _),) = replayed([first])
        assert not isinstance(line, Planned)
        assert scheduler.unfinished and scheduler.stats().steps > 0
    run.drain()


def test_a_piece_that_somebody_deletes_meanwhile_is_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events"
    for _ in range(3):
        engine(LogRing(path, 1 << 20), 3)

    def ring_before(path: Path) -> list[Path]:
        return [*ring(path), path.with_name("events.99")]

    recorder = LogRing(path, 8 << 10)
    monkeypatch.setattr(log_ring, "ring", ring_before)
    recorder.write(b"x" * (8 << 10))
    assert [piece.name for piece in ring(path)] == ["events"]
    assert recorder.write(b"y") is False
    assert path.read_bytes().endswith(b"xy")


def test_a_folder_named_like_a_piece_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "events"
    recorder = LogRing(path, 1 << 10)
    (tmp_path / "events.7").mkdir()
    recorder.write(b"x" * (1 << 10))
    recorder.write(b"y")
    assert path.read_bytes().endswith(b"xy")
    assert (tmp_path / "events.7").is_dir()


def test_a_ring_that_cannot_be_listed_ends_the_recording_not_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = LogRing(tmp_path / "events", 1 << 10)

    def fails(path: Path) -> list[Path]:
        raise PermissionError(path)

    monkeypatch.setattr(log_ring, "ring", fails)
    assert recorder.write(b"x") is False
    assert recorder.write(b"y") is False
    assert (tmp_path / "events").read_bytes() == b"x"
