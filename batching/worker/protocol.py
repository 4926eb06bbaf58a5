"""The seam between scheduling and computing: what an engine may ask of a worker.

Contract (both workers pass the same protocol tests):

- `submit` takes plans in step order and does not block on their results; with `overlap` 1 in the
  capabilities, one more plan may be submitted before the last is waited for.
- A slot named in `plan.inits` forgets whatever it held. There is no other release message: a
  sequence that ended is simply not planned again, and its slot and blocks are reused by the
  scheduler only when no submitted plan touches them.
- The worker appends each sampled token to its slot's token row, at position start + count.
- Within a step, all KV writes of a layer happen before any of its reads, so sequences of one step
  may read blocks that another sequence of the same step fills.
- `wait` raises `WorkerError` if the step failed; the worker is then unusable.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from batching.core.types import StepPlan, StepResult


class WorkerError(RuntimeError):
    """The worker cannot execute steps (any more). The engine process ends."""


class UnsupportedModelError(ValueError):
    """The model needs something this worker cannot do exactly; the message names it."""


class WorkerConfig(msgspec.Struct, frozen=True):
    """What the torch worker is told. Fields and meanings are those of the engine's settings."""

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    quantization: str = "none"
    attention: str = "auto"
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    max_sequences: int = 64
    max_step_tokens: int = 2048
    block_size: int = 32
    kv_cache_gib: float | None = None
    num_blocks: int | None = None
    memory_fraction: float = 0.9
    threads: int | None = None
    tensor_parallel: int = 1
    trust_remote_code: bool = False
    allow_pickle: bool = False


class Capabilities(msgspec.Struct, frozen=True):
    """What a loaded worker offers. Known once the model and its KV pool stand."""

    model: str  # folder or hub id
    architecture: str
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    max_sequences: int
    max_step_tokens: int
    dtype: str
    device: str
    attention: str
    eos_token_ids: tuple[int, ...] = ()
    kv_dtype: str = ""  # of keys and values in their pages
    overlap: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    phases: dict[str, float] = {}  # start-up phase to seconds
    warnings: tuple[str, ...] = ()  # of the start, such as why it is slower than it should be


class Worker(Protocol):
    """Executes step plans over its own model, KV pages and token rows."""

    def capabilities(self) -> Capabilities: ...

    def submit(self, plan: StepPlan) -> Any:
        """Start a step. Returns a handle for `wait`."""

    def wait(self, handle: Any) -> StepResult:
        """The step's result. Raises `WorkerError` if the step failed."""

    def close(self) -> None:
        """Free device memory and processes. Idempotent."""
