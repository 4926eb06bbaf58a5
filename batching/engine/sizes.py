"""How much an engine computes at once."""

from __future__ import annotations

from config.settings import EngineSettings
from config.sizes import ON_ACCELERATOR, ON_CPU, Sizes


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
