"""Weights as the C++ products read them: panels of 32 columns, optionally in int8.

Float32 weights that bfloat16 holds exactly, as those of most checkpoints are, take half the memory:
products turn them back as they read them, and give the same bits.

int8 is symmetric: one scale per column, set by its largest magnitude, and one per row of the other
operand, found as it is used (dynamic per-token quantization, as in LLM.int8, Dettmers et al. 2022,
without its outlier path). Sums are exact in 32-bit integers, so results do not depend on the batch.
"""

from __future__ import annotations

import ctypes

import torch

from batching.worker.cpu.memory import huge

PANEL, TILE = 32, 16  # columns of a panel, and of a tile
UNIT_BYTES = 4
BYTE_ZERO = 128  # the other operand's bytes are unsigned, around this


class CLinear(ctypes.Structure):
    """`Linear` of product.h."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("halved", ctypes.c_int32),
    )


class PackedLinear:
    """Owns the packed tensors of one product; `struct` points to them.

    `weight` is [columns, rows] as torch's linear layers have it, rows a multiple of 16; columns are
    padded with zeros to whole panels. `bias` is [columns], or None. `dtype` is that of the other
    operand, float32 or bfloat16, where it is not the weights' own.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        int8: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        dtype = dtype or weight.dtype
        padding = -len(weight) % PANEL
        weight = weight.detach()
        if padding:  # or it would be a copy
            weight = torch.nn.functional.pad(weight, (0, 0, 0, padding))
        scales = offsets = None
        if int8:
            weight, scales = quantize(weight.to(dtype))
            offsets = BYTE_ZERO * weight.sum(1, dtype=torch.int32)
        else:
            weight = halve(weight) if dtype == torch.float32 else weight.to(dtype)
        if bias is not None:
            bias = torch.nn.functional.pad(bias.detach().float(), (0, padding))
        self.panels = pack(weight)
        self._tensors = (self.panels, bias, scales, offsets)
        self.columns = len(weight)
        self.struct = CLinear(
            *(None if tensor is None else tensor.data_ptr() for tensor in self._tensors),
            weight.shape[1],
            self.columns,
            dtype == torch.float32 and weight.dtype == torch.bfloat16,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors if tensor is not None)


def halve(weight: torch.Tensor) -> torch.Tensor:
    """Weights in bfloat16 if that holds them exactly, else in float32."""
    if weight.dtype == torch.bfloat16:
        return weight
    for rows in (weight[:1], weight):  # most that do not fit are found out by the first row
        shorter = rows.to(torch.bfloat16)
        if not torch.equal(shorter.to(rows.dtype), rows):
            return weight.float()
    return shorter


def pack(weight: torch.Tensor) -> torch.Tensor:
    """[columns, rows] to [columns / 32, rows / p / 16, 2, 16, 16, p], p elements in 32 bits.

    What the first 16 stands for is padded with zeros. The last 16 are columns.
    """
    per = UNIT_BYTES // weight.itemsize
    units = weight.contiguous().view(torch.int32)  # whole units move: a plain transpose is fast
    if padding := -units.shape[1] % TILE:
        units = torch.nn.functional.pad(units, (0, padding))
    columns, rows = units.shape
    panels = huge((columns // PANEL, rows // TILE, PANEL // TILE, TILE, TILE), torch.int32)
    panels.copy_(units.view(-1, PANEL // TILE, TILE, rows // TILE, TILE).permute(0, 3, 1, 4, 2))
    return panels.view(weight.dtype).view(*panels.shape, per)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [columns, rows] and float32 scales [columns], weight ≈ scale * integer."""
    scales = weight.abs().amax(1).float() / 127
    divisors = scales.where(scales > 0, 1)
    return (weight.float() / divisors[:, None]).round().to(torch.int8), scales
