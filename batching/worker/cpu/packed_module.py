"""Linear layers of any torch model computed by our products: the same bits in every batch."""

from __future__ import annotations

import ctypes

import torch
from torch import nn

from batching.worker.cpu.attention import LANES
from batching.worker.cpu.linear import PackedLinear


class CpuLinear(nn.Module):
    """A linear layer with packed weights: any leading dimensions in, float32 out.

    A row's result depends on nothing but the row. `dtype` is that of weights and inputs of the
    product: float32 or bfloat16.
    """

    def __init__(self, linear: nn.Linear, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = PackedLinear(linear.weight.to(dtype), linear.bias)
        self._library, self._dtype = library, dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return self._packed.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).to(self._dtype).contiguous()
        output = torch.empty(len(rows), self._packed.columns)
        self._library.slipstream_project(
            ctypes.byref(self._packed.struct),
            ctypes.c_void_p(rows.data_ptr()),
            len(rows),
            ctypes.c_void_p(output.data_ptr()),
            torch.get_num_threads(),
            self._dtype == torch.bfloat16,
        )
        return output[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)


def swap_linears(module: nn.Module, library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Replace the plain linear layers inside `module` whose shape allows it."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and child.in_features % LANES == 0:
            setattr(module, name, CpuLinear(child, library, dtype))
        else:
            swap_linears(child, library, dtype)
