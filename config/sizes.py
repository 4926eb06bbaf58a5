"""How much is computed at once, where settings leave it to the device."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """Sequences that run at once, and most tokens in a step."""

    max_sequences: int
    max_step_tokens: int


ON_CPU, ON_ACCELERATOR = Sizes(64, 2048), Sizes(256, 8192)
