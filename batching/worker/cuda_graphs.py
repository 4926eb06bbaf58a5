"""CUDA graphs: a step of few tokens as one launch, recorded at start-up for some numbers of tokens.

A step is padded with dummies to the next recorded size; each is a token on a block that no request
is given, without attention. What a step needs is written into buffers that stay where they are
(`triton_slots.py`), and the recorded pass over them is replayed. How much attention there is, and
of what, is in such a buffer, too (`attention_triton.py`): one recording serves every context, and
prompts as well as decodes. Sizes are recorded from the largest to the smallest, from one pool of
memory, so that each finds room in what the one before has used.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from operator import itemgetter

import torch

from batching.worker.attention import AttentionMetadata, LayerSpec
from batching.worker.attention_triton import Schedule, TritonAttention, kind_of
from batching.worker.attention_work import FIELDS
from batching.worker.model import PackedModel
from batching.worker.protocol import Capabilities
from batching.worker.triton_slots import Place

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Where the GPU would wait for the host to launch as much, as it does for some 12 ms a pass.
LARGE_SIZES = (640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096)
HOST_SECONDS = 0.015
GPU_SPEED = 4e14  # operations a second, roughly
LEAST_MIXED = 16  # tokens of the smallest recording with prompts
ROOM = 8192  # numbers that a step's inputs may be besides three a token

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
        block_tables: torch.Tensor,
    ) -> None:
        self._backend, self._limits, self._block_tables = backend, limits, block_tables
        device = block_tables.device
        self._tokens, self._positions, self._places = (
            torch.zeros(tokens, dtype=torch.int64, device=device) for _ in range(3)
        )
        splits = limits.max_sequences * backend.most_splits(limits.max_model_len + 1)
        # A header, tiles, and what sequences of one token are cut into.
        size = (1 + tokens + splits) * FIELDS
        self._work = {
            kind: torch.zeros(size + 3 * tokens + ROOM, dtype=torch.int32, device=device)
            for kind in dict.fromkeys(map(kind_of, specs))
        }

    def place(self, tokens: int, *, mixed: bool) -> Place:
        """Where the inputs of a step of so many tokens are to be."""
        schedule: Schedule = {
            kind: self._backend.work(kind, table, tokens, mixed=mixed)
            for kind, table in self._work.items()
        }
        nothing = self._block_tables[:0, 0]
        metadata = AttentionMetadata(
            query_start=nothing,
            context=nothing,
            block_tables=self._block_tables,
            slot_mapping=self._places[:tokens],
            block_size=self._limits.block_size,
            counts=[1] * tokens,
            contexts=[1] * tokens,
            schedule=schedule,
        )
        inbox = next(iter(self._work.values()))
        return Place(self._tokens[:tokens], self._positions[:tokens], metadata, inbox)


class GraphedModel:
    """Implements `model.Runner`: replays a recording where there is one, else runs the model."""

    def __init__(
        self,
        model: PackedModel,
        backend: TritonAttention,
        specs: list[LayerSpec],
        limits: Capabilities,
        block_tables: torch.Tensor,
    ) -> None:
        """`block_tables` are those that never move (`SlotTables.tables`)."""
        self._model = model
        sizes = [size for size in SIZES if size <= limits.max_step_tokens]
        # Decodes have no more tokens than there are sequences.
        enough = bisect_left(sizes, limits.max_sequences) + 1
        most = min(limits.max_step_tokens, HOST_SECONDS * GPU_SPEED / model.token_operations)
        mixed = [s for s in sizes if s >= LEAST_MIXED] + [s for s in LARGE_SIZES if s <= most]
        self._sizes = {False: sizes[:enough], True: mixed}
        buffers = _Buffers(backend, specs, limits, max(sizes + mixed), block_tables)
        self._places = {
            (size, is_mixed): buffers.place(size, mixed=is_mixed)
            for is_mixed, some in self._sizes.items()
            for size in some
        }
        self._recordings: dict[tuple[int, bool], Recording] = {}

    def record(self, recorder: Callable[[Pass], Recording]) -> None:
        """Record all sizes. Where the model waits for the device none is recorded, and said so."""
        for key, place in sorted(self._places.items(), key=itemgetter(0), reverse=True):
            step = partial(self._model.run, place.tokens, place.positions, place.metadata)
            try:
                self._recordings[key] = recorder(step)
            except RuntimeError as error:
                logger.warning("no CUDA graphs: %s", str(error).split("\n")[0])
                self._recordings.clear()
                return

    def place(self, tokens: int, sequences: int) -> Place | None:
        """Where a step of that size has to be, or None where it is not recorded."""
        is_mixed = tokens > sequences
        sizes = self._sizes[is_mixed] if self._recordings else []
        index = bisect_left(sizes, tokens)
        return self._places[sizes[index], is_mixed] if index < len(sizes) else None

    @property
    def weight_bytes(self) -> int:
        return self._model.weight_bytes

    def hidden(
        self, tokens: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        is_mixed = any(work.prompt_programs for work in metadata.schedule.values())
        recording = self._recordings.get((len(tokens), is_mixed))
        if recording is None:
            return self._model.hidden(tokens, positions, metadata)
        replay, output = recording
        replay()
        return output

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.scores(hidden)

    def largest(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.largest(hidden)
