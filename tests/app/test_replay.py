"""`slipstream replay`: what it prints and returns."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli import main
from batching.core.event_log import RecordingScheduler
from batching.engine.log_ring import LogRing, ring
from tests.core.harness import Harness, limits, request


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A ring of several pieces."""
    path = tmp_path / "events"
    recorder = LogRing(path, 64 << 10)
    make = lambda limits: RecordingScheduler(limits, write=recorder.write)  # noqa: E731
    run = Harness(limits(), make=make)
    for n in range(150):
        run.add(request(f"request-{n}", [1 + n % 5] * 9, 6, arrival=run.now))
        run.step()
    run.drain()
    assert len(ring(path)) > 2
    return path


def test_all_pieces_are_replayed_oldest_first(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(log)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [p.name for p in ring(log)[::-1]]
    assert all(line.endswith("plans, the same") for line in lines)


def test_a_request_has_its_story(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(log), "--request", "request-149"]) == 0
    out = capsys.readouterr().out
    assert "\nrequest request-149\n" in out
    assert "arrives with 9 tokens" in out and "ends (length) with 6 tokens" in out
    assert main(["replay", str(log), "--request", "nobody"]) == 0
    assert "no request nobody" in capsys.readouterr().err


def test_a_difference_is_shown_with_its_place(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    number = max(n for n, line in enumerate(lines) if line.startswith(b'["add"'))
    log.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
    assert main(["replay", str(log)]) == 1
    assert "then not: line" in capsys.readouterr().out.splitlines()[-1]


def test_a_cut_last_line_is_said_and_forgiven(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.write_bytes(log.read_bytes()[:-5])
    assert main(["replay", str(log)]) == 0
    assert "events: the last line was cut off" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\n", b"\x00\xff\n", b'["plan",1,null]\n', b"[]\n"])
def test_what_is_no_log(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    assert main(["replay", str(path)]) == (0 if not content else 1)
    assert "x: 0 plans" in capsys.readouterr().out


def test_wrong_usage(tmp_path: Path) -> None:
    for arguments in ([], [str(tmp_path / "missing")], [str(tmp_path / "no" / "folder")]):
        with pytest.raises(SystemExit) as ended:
            main(["replay", *arguments])
        assert ended.value.code == 2
