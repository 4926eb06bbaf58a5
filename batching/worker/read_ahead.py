"""Weights straight from their files to their place on the device, while the start goes on.

For models of Llama's shape the headers of the files say what there will be. So one piece of memory
is set aside on the device at once, in which what fused layers merge lies side by side, and threads
fill it while transformers is imported, kernels are compiled and memory is measured: none of that
looks at a weight. On the host each thread has one buffer, of memory that the device reads by
itself. What does not match the model exactly is left to transformers.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from batching.worker.device import free_bytes, free_pinned, serving_dtype
from batching.worker.kv_pool import GIB
from batching.worker.llama_shape import CLASSES
from batching.worker.protocol import UnsupportedModelError, WorkerConfig
from batching.worker.stored import Stored, stored_tensors

logger = logging.getLogger(__name__)

# By what an H200's machine measured: 32 GB/s, one thread alone 7.5; beside busy Python 21, and 3.6
# with the usual interval, since a thread asks for Python's lock a few times for each piece.
READERS = 8  # threads
PIECE = 32 << 20  # bytes that a thread reads and sends at once
SWITCH = 5e-4  # seconds after which the lock is given away
ALIGNED = 256  # bytes
FORMATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_RANKS = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "gate_proj": 0, "up_proj": 1}  # of what is merged


class _Config(msgspec.Struct):
    """What config.json says about whether and how the weights are used as they are stored."""

    model_type: str = ""
    dtype: str | None = None
    torch_dtype: str | None = None
    quantization_config: Any = None
    auto_map: Any = None


class _Piece(NamedTuple):
    path: Path
    offset: int
    dtype: torch.dtype  # of the file
    target: torch.Tensor


def read_ahead(config: WorkerConfig, device: torch.device) -> ReadAhead | None:
    """Begin to read a folder's weights; None where they are not, or not surely, used as they are.

    Raises `UnsupportedModelError` if they do not fit the device.
    """
    if config.quantization != "none" or config.tensor_parallel > 1:
        return None
    folder = Path(config.model)
    try:
        found = msgspec.json.decode((folder / "config.json").read_bytes(), type=_Config)
        if found.model_type not in CLASSES or found.quantization_config or found.auto_map:
            return None
        stored = stored_tensors(folder)
    except (OSError, ValueError):
        return None
    named = getattr(torch, found.dtype or found.torch_dtype or "", None)
    known = named if isinstance(named, torch.dtype) else None
    dtype = serving_dtype(config.dtype, known, device)
    return ReadAhead(config.model, stored, dtype, device)


class ReadAhead:
    """Tensors on the device that threads fill until `finish` has returned."""

    def __init__(
        self, model: str, stored: dict[str, Stored], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype, self._model, self._device = dtype, model, device
        places, self._bytes = _arrange(stored, dtype)
        refuse_beyond(model, self._bytes, free_bytes(device))
        # Zeros, so that what is computed meanwhile is finite.
        memory = torch.zeros(self._bytes, dtype=torch.uint8, device=device)
        self.tensors = {
            name: memory[begin:end].view(dtype).view(stored[name].shape)
            for name, (begin, end) in places.items()
        }
        self._pieces = deque(self._cut(stored))
        self._error: Exception | None = None
        self._count = len(self._pieces)
        self._began = self._ended = time.perf_counter()
        self._switch = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH)
        self._threads = [
            threading.Thread(target=self._work, name="weights", daemon=True) for _ in range(READERS)
        ]
        for thread in self._threads:
            thread.start()

    def fill(self, model: nn.Module, dtype: torch.dtype) -> bool:
        """Make the tensors the parameters of a model which has empty ones.

        Returns False, and changes nothing, unless these are exactly its parameters.
        """
        parameters = dict(model.named_parameters())  # tied ones once
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        if dtype != self.dtype or shapes != {n: tensor.shape for n, tensor in self.tensors.items()}:
            return False
        placed = {
            parameter: nn.Parameter(self.tensors[name], requires_grad=False)
            for name, parameter in parameters.items()
        }
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                setattr(module, name, placed[parameter])
        return True

    def cancel(self) -> None:
        """Stop reading, and forget the tensors."""
        self._pieces.clear()
        for thread in self._threads:
            thread.join()
        sys.setswitchinterval(self._switch)
        self.tensors.clear()

    def finish(self, report: Callable[[str, float], None]) -> None:
        """Wait until all is on the device. Raises `UnsupportedModelError` if it cannot be read."""
        for thread in self._threads:
            while thread.is_alive():
                thread.join(0.2)
                report("weights", 1 - len(self._pieces) / self._count)
        sys.setswitchinterval(self._switch)
        if self._error is not None:
            raise UnsupportedModelError(f"cannot load {self._model!r}: {self._error}")
        if self._device.type != "cpu":
            free_pinned()
        if self.tensors:
            size, seconds = self._bytes / GIB, self._ended - self._began
            logger.info("%.2f GiB of weights were on the device after %.1f s", size, seconds)

    def _cut(self, stored: dict[str, Stored]) -> list[_Piece]:
        """All tensors in pieces, in the files' order."""
        pieces = []
        for name, (path, offset, kind, _) in sorted(stored.items(), key=lambda item: item[1][:2]):
            dtype, target = FORMATS[kind], self.tensors[name].view(-1)
            for part in target.split(PIECE // dtype.itemsize):
                pieces.append(_Piece(path, offset, dtype, part))
                offset += len(part) * dtype.itemsize
        return pieces

    def _work(self) -> None:
        try:
            with _Reader(self._device) as reader:
                while True:
                    piece = self._pieces.popleft()
                    piece.target.copy_(reader.read(piece))  # waits until the buffer is free again
        except IndexError:  # nothing is left
            self._ended = time.perf_counter()
        except Exception as error:
            self._error = error
            self._pieces.clear()


class _Reader:
    """A buffer, and the files that were read into it."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=device.type != "cpu")
        self._bytes: Any = self._buffer.numpy()
        self._files: dict[Path, int] = {}

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            os.close(file)

    def read(self, piece: _Piece) -> torch.Tensor:
        """The piece as the file has it, until the next one is read."""
        if piece.path not in self._files:
            self._files[piece.path] = os.open(piece.path, os.O_RDONLY)
        size, done = len(piece.target) * piece.dtype.itemsize, 0
        while done < size:
            into = [self._bytes[done:size]]
            count = os.preadv(self._files[piece.path], into, piece.offset + done)
            if not count:
                raise OSError(f"{piece.path.name} has become shorter")
            done += count
        return self._buffer[:size].view(piece.dtype)


def refuse_beyond(model: str, needed: int, free: int) -> None:
    """Raise `UnsupportedModelError` if that many bytes of weights do not fit `free` bytes."""
    if needed > free:
        raise UnsupportedModelError(
            f"the weights of {model!r} take {needed / GIB:.2f} GiB, and {free / GIB:.2f} GiB of "
            "the device's memory are free"
        )


def _arrange(
    stored: dict[str, Stored], dtype: torch.dtype
) -> tuple[dict[str, tuple[int, int]], int]:
    """From where to where each tensor lies in the device's memory, and how much that takes."""
    places, at = {}, 0
    for name in sorted(stored, key=_order):
        if _order(name)[3] == 0:  # others follow at once
            at = -(-at // ALIGNED) * ALIGNED
        size = torch.Size(stored[name].shape).numel() * dtype.itemsize
        places[name] = at, at + size
        at += size
    return places, at


def _order(name: str) -> tuple[str, str, bool, int, str]:
    """Sorts the weights that are merged side by side."""
    module, _, parameter = name.rpartition(".")
    parent, _, own = module.rpartition(".")
    return parent, parameter, own not in _RANKS, _RANKS.get(own, 0), own
