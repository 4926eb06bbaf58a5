"""What a pooling engine may ask of its worker: batches of texts in, one row of numbers each out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from batching.core.types import PoolRequest

PoolTask = Literal["embed", "classify"]


class PoolConfig(msgspec.Struct, frozen=True):
    """What the torch worker is told. Fields and meanings are those of the engine's settings."""

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    quantization: str = "none"
    max_model_len: int | None = None
    threads: int | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


class PoolCapabilities(msgspec.Struct, frozen=True):
    """What a loaded pooling model gives, and what it takes."""

    model: str  # folder
    architecture: str
    task: PoolTask
    size: int  # numbers per text: dimensions of an embedding, or labels of a classifier
    vocab_size: int
    max_model_len: int  # tokens of one text
    dtype: str
    device: str
    pooling: str  # how tokens become one row: "mean", "cls", …
    runner: str  # "packed" or "padded"
    labels: tuple[str, ...] = ()
    activation: str = "softmax"  # of a classifier's logits: softmax, sigmoid or identity
    lower_case: bool = False  # texts are lower-cased before the tokenizer
    weight_bytes: int = 0
    phases: dict[str, float] = {}  # start-up phase to seconds
    warnings: tuple[str, ...] = ()  # of the start, such as why it is slower than it should be


class PoolWorker(Protocol):
    """Computes one batch at a time. A text's numbers do not depend on its batch (see `docs`)."""

    def capabilities(self) -> PoolCapabilities: ...

    def run(self, batch: Sequence[PoolRequest]) -> list[bytes]:
        """Little-endian float32 of each request, in order. If it raises, the worker is unusable."""
