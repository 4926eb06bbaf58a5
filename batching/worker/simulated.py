"""A worker that computes nothing: deterministic tokens, and step times from a linear cost.

It serves the twin (virtual clock: `sleep` does nothing), and measures everything that is not the
model (real clock, zero cost).
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from batching.core.types import SlotInit, StepPlan, StepResult, TokenLogprobs
from batching.worker.grammar import Grammars, Matcher, allowed
from batching.worker.protocol import Capabilities, UnsupportedModelError


class StepCost(msgspec.Struct, frozen=True):
    """Seconds of a step: fixed + per prefill token + per sequence + per context token read."""

    fixed: float = 0.0
    prefill_token: float = 0.0
    sequence: float = 0.0
    context_token: float = 0.0

    def seconds(self, plan: StepPlan) -> float:
        """The time one plan takes."""
        prefill = sum(s.count for s in plan.sequences if s.count > 1)
        context = sum(s.start + s.count for s in plan.sequences)
        return (
            self.fixed
            + self.prefill_token * prefill
            + self.sequence * len(plan.sequences)
            + self.context_token * context
        )


@dataclass
class _Row:
    """What the worker remembers of a slot."""

    seed: int
    tokens: list[int]
    prompt_length: int
    logprobs: bool
    prompt_logprobs: bool
    matcher: Matcher | None


def simulated_token(seed: int, position: int, vocab_size: int) -> int:
    """The token at `position`: a hash, so that a resumed or preempted request continues exactly."""
    return zlib.crc32(position.to_bytes(8, "little"), seed) % vocab_size


class SimulatedWorker:
    """Implements `batching.worker.protocol.Worker` without a model."""

    def __init__(
        self,
        capabilities: Capabilities,
        cost: StepCost | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._capabilities = capabilities
        self._cost = cost or StepCost()
        self._sleep = sleep
        self._rows: dict[int, _Row] = {}
        self._grammars = Grammars(
            capabilities.model, capabilities.vocab_size, capabilities.eos_token_ids
        )

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def submit(self, plan: StepPlan) -> StepPlan:
        return plan

    def wait(self, handle: StepPlan) -> StepResult:
        """Sleep for the step's cost, then return its tokens."""
        seconds = self._cost.seconds(handle)
        if seconds > 0:
            self._sleep(seconds)
        for init in handle.inits:
            self._begin(init)
        tokens: list[int] = []
        gave_up: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        for sequence in handle.sequences:
            row, end = self._rows[sequence.slot], sequence.start + sequence.count
            if row.prompt_logprobs and sequence.start + 1 < row.prompt_length:
                known = row.tokens[sequence.start + 1 : min(end + 1, row.prompt_length)]
                prompt_logprobs[sequence.slot] = [_certain(t) for t in known]
            if sequence.sample:
                token = self._token(row, end)
                if token is None:
                    gave_up.append(sequence.slot)
                    token = 0
                row.tokens[end:] = [token]
                tokens.append(token)
                logprobs.append(_certain(token) if row.logprobs else None)
        some = tuple(logprobs) if any(logprobs) else ()
        result = tuple(tokens)
        return StepResult(handle.step, result, seconds, some, prompt_logprobs, tuple(gave_up))

    def _begin(self, init: SlotInit) -> None:
        packed = b"".join(t.to_bytes(8, "little") for t in init.tokens[: init.prompt_length])
        matcher = None
        if init.params.grammar is not None:
            matcher = self._grammars.matcher(init.params)
            for token in init.tokens[init.prompt_length :]:
                matcher.accept(token)
        seed = init.params.seed if init.params.temperature else 0  # greedy has none
        self._rows[init.slot] = _Row(
            zlib.crc32(packed, seed & 0xFFFFFFFF),
            list(init.tokens),
            init.prompt_length,
            init.params.logprobs is not None,
            init.params.prompt_logprobs is not None,
            matcher,
        )

    def _token(self, row: _Row, position: int) -> int | None:
        """The token at `position`; None if the row's grammar allows none."""
        vocab_size = self._capabilities.vocab_size
        if row.matcher is None:
            token = simulated_token(row.seed, position, vocab_size)
            while token in self._capabilities.eos_token_ids:  # it always says all it may
                token = (token + 1) % vocab_size
            return token
        bits = np.zeros(self._grammars.words, dtype=np.int32)
        if not row.matcher.fill(bits):
            return None
        choices = np.flatnonzero(allowed(bits, vocab_size))
        token = int(choices[simulated_token(row.seed, position, len(choices))])
        row.matcher.accept(token)
        return token

    def close(self) -> None:
        self._rows.clear()


def _certain(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, 0.0, 1, ((token, 0.0),))


def folder_capabilities(
    folder: str,
    *,
    num_blocks: int,
    block_size: int,
    max_sequences: int,
    max_step_tokens: int,
    max_model_len: int | None,
) -> Capabilities:
    """Capabilities of a simulated model with the vocabulary and context of a real one's folder.

    Raises `UnsupportedModelError` if the folder has no usable config.json.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_bytes())
        vocab_size = int(config["vocab_size"])
        end_tokens = _end_tokens(Path(folder), config)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"cannot read {folder}/config.json: {error}") from error
    return Capabilities(
        model=folder,
        architecture="simulated",
        vocab_size=vocab_size,
        max_model_len=max_model_len or int(config.get("max_position_embeddings", 2048)),
        num_blocks=num_blocks,
        block_size=block_size,
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
        dtype="none",
        device="none",
        attention="none",
        eos_token_ids=end_tokens,
    )


def _end_tokens(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    try:
        config = config | json.loads((folder / "generation_config.json").read_bytes())
    except FileNotFoundError:
        pass
    ids = config.get("eos_token_id")
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (int(ids),)
