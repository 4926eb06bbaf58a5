"""Linear layers with weights of 8 or 4 bits, quantized when the model is loaded.

Weights only: they are multiplied in the format of the layer's inputs, so nothing needs calibration.
`fp8` (e4m3) and `int8` have a scale for each output, `int4` a scale and an offset for each `GROUP`
inputs. Embeddings and the head stay as they are. On a GPU few rows are multiplied by a kernel that
reads the codes; many rows, and all on a CPU, by weights made anew for each product.

A rank's share of a layer is quantized as the whole would be: a scale is that of all ranks' inputs,
a group of int4 lies within one rank (where a rank's inputs are a multiple of `GROUP`).
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from batching.worker.protocol import UnsupportedModelError

GROUP = 128  # inputs that share a scale in int4, or what of it divides their number
LEAST_GROUP = 32
LARGEST = {"fp8": 448.0, "int8": 127.0}  # code
FEW_ROWS = 256  # up to here the product reads codes: making weights would take longer


class QuantizedLinear(nn.Module):
    """A linear layer whose weights are `codes`, in memory and on their way to the product.

    A weight is `scale * code`, in int4 `scale * code + low`, rounded to the layer's dtype. Codes of
    int4 are two to a byte: input i in the low half, input i + in_features / 2 in the high one.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    lows: torch.Tensor | None

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        weight, lows = _own(linear.weight).detach(), None
        self.out_features, self.in_features = weight.shape
        self.is_partial = _is_partial(linear.weight)  # the ranks' products are to be added
        self.group = gcd(self.in_features, GROUP)
        if kind == "int4":
            codes, scales, lows = quantize_groups(weight, self.group)
        else:
            codes, scales = quantize_rows(weight, kind, is_partial=self.is_partial)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("lows", lows)
        self.bias = None if linear.bias is None else nn.Parameter(_own(linear.bias), False)

    @property
    def weight(self) -> torch.Tensor:
        """The weights [out_features, in_features] that the codes stand for."""
        dtype = self.scales.dtype
        if self.lows is None:
            return self.codes.to(dtype) * self.scales[:, None]
        codes = torch.cat([self.codes & 15, self.codes >> 4], dim=1).to(dtype)
        grouped = codes.view(self.out_features, -1, self.group)
        return (grouped * self.scales[:, :, None]).add_(self.lows[:, :, None]).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_partial:
            return self._product(x, self.bias)
        product = self._product(x, None)
        dist.all_reduce(product)
        return product if self.bias is None else product + self.bias

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if x.device.type == "cpu" or len(rows) > FEW_ROWS:
            return functional.linear(x, self.weight, bias)
        from batching.worker.quantized_kernel import multiply  # only GPUs need Triton

        product = multiply(rows, self.codes, self.scales, self.lows, self.group, bias)
        return product.view(*x.shape[:-1], self.out_features)


def _own(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank has of it."""
    share: torch.Tensor = getattr(parameter, "to_local", lambda: parameter)()
    return share


def _is_partial(weight: torch.Tensor) -> bool:
    """Whether ranks share a weight by inputs."""
    return any(placement.is_shard(1) for placement in getattr(weight, "placements", ()))


def quantize_rows(
    weight: torch.Tensor, kind: str, *, is_partial: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, columns], and scales [rows] in the weight's dtype."""
    most, largest = LARGEST[kind], weight.abs().amax(1).float()
    if is_partial:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    scales = (largest / most).to(weight.dtype)
    scaled = weight.float() / scales.where(scales > 0, 1).float()[:, None]
    scaled.clamp_(-most, most)  # scales are rounded
    return (scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)), (
        scales
    )


def quantize_groups(
    weight: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int4 codes, two to a byte, uint8 [rows, columns / 2]; scales and lows [rows, groups]."""
    grouped = weight.float().view(len(weight), -1, group)
    lows = grouped.amin(2).to(weight.dtype)
    scales = ((grouped.amax(2) - lows) / 15).to(weight.dtype)
    divisors = scales.where(scales > 0, 1).float()
    codes = ((grouped - lows[:, :, None]) / divisors[:, :, None]).round().clamp(0, 15)
    low, high = codes.to(torch.uint8).flatten(1).chunk(2, dim=1)
    return low | high << 4, scales, lows


def quantize(model: Any, kind: str) -> None:
    """Replace the linear layers inside the base model, one at a time.

    Raises `UnsupportedModelError` if that would leave much of the weights as they are.
    """
    name, base = model.config.model_type, model.base_model
    if any(parameter.ndim > 2 for parameter in base.parameters()):
        raise UnsupportedModelError(f"{name}: no {kind} weights for experts")
    plan = model.config.get_text_config(decoder=True).base_model_tp_plan or {}
    divisions = {how for how in plan.values() if how.startswith(("colwise_", "rowwise_", "packed"))}
    if divisions and any(hasattr(parameter, "placements") for parameter in base.parameters()):
        raise UnsupportedModelError(
            f"{name}: no {kind} weights with tensor_parallel, whose layers are {min(divisions)}"
        )
    found = [
        (parent, attribute, child)
        for parent in base.modules()
        for attribute, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    if not found:
        raise UnsupportedModelError(f"{name}: no {kind} weights, because it has no linear layers")
    for parent, attribute, child in found:
        inputs = _own(child.weight).shape[1]
        if kind == "int4" and gcd(inputs, GROUP) < LEAST_GROUP:
            raise UnsupportedModelError(
                f"{name}: no int4 weights, because the {inputs} inputs of {attribute} "
                f"are no multiple of {LEAST_GROUP}"
            )
        setattr(parent, attribute, QuantizedLinear(child, kind))
