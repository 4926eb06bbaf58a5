"""A model folder with broken text files is refused by a message, not by a traceback."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from app.flights.recorder import FlightRecorder
from app.inputs.tokenizer import TokenizerError
from app.service import Service
from app.telemetry.metrics import Metrics
from batching.worker.protocol import Capabilities
from config.settings import ServerSettings
from tests.app.fake_engine import FakeEngine


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", b'{"top_k": 50.5}'),
        ("generation_config.json", b"{bad"),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_broken_text_file_is_named(
    model_folder: Path, capabilities: Capabilities, tmp_path: Path, name: str, content: bytes
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / name).write_bytes(content)
    broken = msgspec.structs.replace(capabilities, model=str(folder))
    with pytest.raises(TokenizerError, match="chat template or generation config"):
        metrics = Metrics("tiny")
        flights = FlightRecorder(metrics)
        Service.load(ServerSettings(), FakeEngine(broken), broken, metrics, flights)
