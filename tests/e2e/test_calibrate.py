"""`slipstream calibrate` measures a real server, and the twin runs on what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import loadtest
from app.cli import main

TRACE = str(Path(loadtest.__file__).parent / "data" / "azure-conv-2023.csv")


def test_a_profile_is_measured_and_simulated(tmp_path: Path) -> None:
    profile, out = tmp_path / "profile.json", tmp_path / "out.json"
    flags = ["--for", "2", "--dtype", "float32", "--max-sequences", "12"]
    assert main(["calibrate", *flags, "--out", str(profile)]) == 0
    found = json.loads(profile.read_text())
    assert found["limits"]["max_sequences"] == 12
    assert found["steps"] > 50
    curve = found["step_time"]["curve"]
    assert 0 < curve[0] < curve[-1]
    command = ["simulate", TRACE, "--hardware", str(profile), "--seconds", "10"]
    assert main([*command, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["summary"]["errors"] == {}


@pytest.mark.parametrize(
    ("flags", "code"), [(["--port", "x"], 2), (["./no/such/model"], 1), (["--nonsense"], 2)]
)
def test_what_cannot_be_measured(
    tmp_path: Path, flags: list[str], code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["calibrate", "--out", str(tmp_path / "p.json"), *flags])
    except SystemExit as stop:
        found = int(str(stop.code))
    assert found == code
    assert "error" in capfd.readouterr().err
