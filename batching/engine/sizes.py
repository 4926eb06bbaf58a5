"""How much is computed at once, where settings leave it to the device."""

from __future__ import annotations

from typing import NamedTuple

from config.settings import EngineSettings


class Sizes(NamedTuple):
    """Sequences that run at once, and most tokens in a step."""

    max_sequences: int
    max_step_tokens: int


ON_CPU, ON_ACCELERATOR = Sizes(64, 2048), Sizes(256, 8192)


def sizes_of(settings: EngineSettings) -> Sizes:
    """What the settings say, else what their device is good for."""
    usual = ON_CPU
    if settings.worker == "torch":
        from batching.worker.device import choose_device

        usual = ON_CPU if choose_device(settings.device).type == "cpu" else ON_ACCELERATOR
    return Sizes(
        settings.max_sequences or usual.max_sequences,
        settings.max_step_tokens or usual.max_step_tokens,
    )
