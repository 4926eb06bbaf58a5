"""CUDA graphs: a step of few tokens as one launch, recorded at start-up for some numbers of tokens.

A step is padded with dummies to the next recorded size; each is a sequence of one token, on a block
that no request is given. What a step needs is copied into buffers that stay where they are, and the
recorded pass over them is replayed. How much attention there is, and of what, is in such a buffer,
too (`attention_triton.py`): one recording serves every context, and prompts as well as decodes.
Sizes are recorded from the largest to the smallest, from one pool of memory, so that each finds
room in what the one before has used.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch

from batching.worker.attention import AttentionMetadata, LayerSpec
from batching.worker.attention_triton import Schedule, TritonAttention, kind_of
from batching.worker.attention_work import FIELDS
from batching.worker.device import upload
from batching.worker.model import PackedModel
from batching.worker.protocol import Capabilities

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
LEAST_MIXED = 16  # tokens of the smallest recording with prompts

Pass = Callable[[], torch.Tensor]
Recording = tuple[Callable[[], None], torch.Tensor]  # how to replay, and where the result will be


class Recorder:
    """Records passes on a CUDA device, in one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # one: cuBLAS keeps 32 MiB for each that it has seen

    def __call__(self, run: Pass) -> Recording:
        """Raises RuntimeError if the pass waits for the device."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()  # compiles kernels and sets libraries up, which a recording may not
            torch.cuda.current_stream().wait_stream(self._stream)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = run()
        return graph.replay, output


class _Buffers:
    """A step's inputs, where recordings look for them: room for any step of up to `tokens`."""

    def __init__(
        self,
        backend: TritonAttention,
        specs: list[LayerSpec],
        limits: Capabilities,
        tokens: int,
        device: torch.device,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._backend, self._specs, self._block_size = backend, specs, limits.block_size
        self.tokens = zeros(tokens, dtype=torch.int64)
        self.positions = zeros(tokens, dtype=torch.int64)
        self._slots = zeros(tokens, dtype=torch.int64)
        width = limits.max_model_len // limits.block_size + 1
        self._tables = zeros(tokens, width, dtype=torch.int32)
        splits = limits.max_sequences * backend.most_splits(limits.max_model_len + 1)
        rows = 1 + tokens + splits  # a header, tiles and dummies, single queries
        self._work = {kind_of(spec): zeros(rows, FIELDS, dtype=torch.int32) for spec in specs}

    def fill(self, tokens: torch.Tensor, positions: torch.Tensor, step: AttentionMetadata) -> None:
        """Take in a step, padding included. Waits for nothing."""
        count, width = step.block_tables.shape
        self.tokens[: len(tokens)].copy_(tokens)
        self.positions[: len(tokens)].copy_(positions)
        self._slots[: len(tokens)].copy_(step.slot_mapping)
        self._tables[:count, :width].copy_(step.block_tables)
        device = self._tables.device
        for kind, division in self._backend.divide(step, self._specs).items():
            table = division.table()
            self._work[kind][: len(table)].copy_(upload(table, torch.int32, device))

    def metadata(self, tokens: int, *, mixed: bool) -> AttentionMetadata:
        """What layers see while a pass over so many tokens is recorded."""
        schedule: Schedule = {
            kind: self._backend.work(kind, table, tokens, mixed=mixed)
            for kind, table in self._work.items()
        }
        bounds = torch.arange(tokens + 1, dtype=torch.int32, device=self._tables.device)
        return AttentionMetadata(
            query_start=bounds,
            context=torch.ones_like(bounds[1:]),
            block_tables=self._tables[:tokens],
            slot_mapping=self._slots[:tokens],
            block_size=self._block_size,
            counts=[1] * tokens,
            contexts=[1] * tokens,
            schedule=schedule,
        )


class GraphedModel:
    """Implements `model.Runner`: replays a recording where there is one, else runs the model."""

    def __init__(
        self,
        model: PackedModel,
        backend: TritonAttention,
        specs: list[LayerSpec],
        limits: Capabilities,
        spare: int,
    ) -> None:
        """`spare` is the block of dummies, which has no other use."""
        self._model, self._spare = model, spare
        self._device = model.model.device
        sizes = [size for size in SIZES if size <= limits.max_step_tokens]
        # Decodes have no more tokens than there are sequences.
        enough = bisect_left(sizes, limits.max_sequences) + 1
        self._sizes = {False: sizes[:enough], True: [s for s in sizes if s >= LEAST_MIXED]}
        self._buffers = _Buffers(backend, specs, limits, sizes[-1], self._device)
        self._recordings: dict[tuple[int, bool], Recording] = {}

    def record(self, recorder: Callable[[Pass], Recording]) -> None:
        """Record all sizes. Where the model waits for the device none is recorded, and said so."""
        steps = [(size, mixed) for mixed, sizes in self._sizes.items() for size in sizes]
        for size, mixed in sorted(steps, reverse=True):
            metadata = self._buffers.metadata(size, mixed=mixed)
            metadata.block_tables.fill_(self._spare)
            metadata.slot_mapping.fill_(self._spare * metadata.block_size)
            tokens, positions = self._buffers.tokens[:size], self._buffers.positions[:size]
            self._buffers.fill(tokens, positions, metadata)
            try:
                self._recordings[size, mixed] = recorder(
                    partial(self._model.run, tokens, positions, metadata)
                )
            except RuntimeError as error:
                logger.warning("no CUDA graphs: %s", str(error).split("\n")[0])
                self._recordings.clear()
                return

    @property
    def weight_bytes(self) -> int:
        return self._model.weight_bytes

    def padding(self, tokens: int, sequences: int) -> int:
        sizes = self._sizes[tokens > sequences] if self._recordings else []
        index = bisect_left(sizes, tokens)
        return sizes[index] - tokens if index < len(sizes) else 0

    def hidden(
        self, tokens: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        key = len(tokens), len(tokens) > len(metadata.counts)
        if key not in self._recordings:
            return self._model.hidden(tokens, positions, metadata)
        replay, output = self._recordings[key]
        self._buffers.fill(tokens, positions, metadata)
        replay()
        return output

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)

    def largest(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.largest(hidden)
