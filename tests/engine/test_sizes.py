"""What runs at once where settings do not say."""

from __future__ import annotations

import pytest

from batching.engine.sizes import sizes_of
from config.settings import EngineSettings


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"device": "cpu"}, (64, 2048)),
        ({"device": "cuda"}, (256, 8192)),
        ({"device": "cuda", "max_sequences": 5}, (5, 8192)),
        ({"device": "cuda", "worker": "simulated"}, (64, 2048)),
        ({"device": "cpu", "max_step_tokens": 100}, (64, 100)),
    ],
)
def test_the_device_decides_what_settings_leave_open(
    given: dict[str, object], expected: tuple[int, int]
) -> None:
    assert sizes_of(EngineSettings.model_validate(given)) == expected
