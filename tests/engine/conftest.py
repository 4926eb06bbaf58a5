"""A model folder for the simulated worker: it needs a config.json and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from config.settings import EngineSettings


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    (tmp_path / "config.json").write_text(
        json.dumps({"vocab_size": 1000, "max_position_embeddings": 256})
    )
    return EngineSettings(model=str(tmp_path), worker="simulated", block_size=16, num_blocks=64)
