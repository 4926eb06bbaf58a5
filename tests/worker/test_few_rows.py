"""Products of few rows against float64: on a GPU where there is one, else interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from batching.worker.few_rows import SUMMED, is_for, multiply
from batching.worker.fused_layers import FusedNorm
from tests.worker.test_triton_attention import DEVICE, DTYPES, TOLERANCES

ROWS = [1, 2, 3, 5, 16]
SIZES = [(32, 5), (1100, 12), (2048, 9), (4104, 9)]  # inputs, outputs


class Case:
    """Some rows, and a layer with RMSNorm before it."""

    def __init__(self, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(rows)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        self.x, self.before = normal(rows, inputs), normal(rows, outputs)
        self.linear = nn.Linear(inputs, outputs, device=DEVICE, dtype=dtype)
        self.linear.weight.data = normal(outputs, inputs) / inputs**0.5
        self.linear.bias.data = normal(outputs)
        module: Any = nn.Module()
        module.weight, module.variance_epsilon = normal(inputs), 1e-5
        self.norm = FusedNorm(module)
        scale = (self.x.double().square().mean(1, keepdim=True) + 1e-5).rsqrt()
        rounded = (self.x.double() * scale).to(dtype).double()
        self.normed = (rounded * module.weight.double()).to(dtype).double()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Float64 [rows, outputs] of float64 rows."""
        bias = None if self.linear.bias is None else self.linear.bias.double()
        return functional.linear(x, self.linear.weight.double(), bias)


FEW = [(rows, dtype) for dtype in DTYPES for rows in ROWS if rows <= SUMMED]
MORE = [(rows, dtype) for dtype in DTYPES for rows in ROWS if rows > SUMMED and dtype.itemsize == 2]


def check(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.is_contiguous()
    tolerance = 4 * TOLERANCES[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows, dtype", FEW)
@torch.inference_mode()
def test_normalised_with_a_bias(rows: int, dtype: torch.dtype, size: tuple[int, int]) -> None:
    case = Case(rows, *size, dtype)
    check(multiply(case.x, case.linear, case.norm), case.product(case.normed), dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows, dtype", FEW + MORE)
@torch.inference_mode()
def test_added_in_place(rows: int, dtype: torch.dtype, size: tuple[int, int]) -> None:
    case = Case(rows, *size, dtype)
    case.linear.bias = None
    expected = case.before.double() + case.product(case.x.double())
    assert multiply(case.x, case.linear, added_to=case.before) is case.before
    check(case.before, expected, dtype)


@pytest.mark.parametrize("rows, dtype", FEW)
@torch.inference_mode()
def test_activated(rows: int, dtype: torch.dtype) -> None:
    case = Case(rows, 1056, 2 * 19, dtype)
    case.linear.bias = None
    gate, up = case.product(case.normed).to(dtype).double().chunk(2, dim=1)
    expected = functional.silu(gate).to(dtype).double() * up
    check(multiply(case.x, case.linear, case.norm, paired=True), expected, dtype)


@pytest.mark.parametrize("rows, dtype", FEW)
@torch.inference_mode()
def test_rows_do_not_depend_on_each_other(rows: int, dtype: torch.dtype) -> None:
    case = Case(rows, 1100, 12, dtype)
    whole = multiply(case.x, case.linear, case.norm)
    case.x[:-1] = float("nan")
    assert torch.equal(multiply(case.x, case.linear, case.norm)[-1], whole[-1])


@pytest.mark.parametrize(
    "shape, dtype, wanted",  # whether for sums, and for products of normalised rows
    [
        ((1, 14336), torch.float16, (True, True)),
        ((4, 1024), torch.float16, (True, True)),
        ((4, 2048), torch.float16, (True, False)),
        ((16, 64), torch.float16, (True, False)),
        ((2, 4096), torch.float16, (False, False)),
        ((17, 64), torch.float16, (False, False)),
        ((5, 64), torch.float32, (False, False)),
    ],
)
def test_what_it_is_for(shape: tuple[int, int], dtype: torch.dtype, wanted: Any) -> None:
    x, linear = torch.empty(shape, dtype=dtype), nn.Linear(shape[1], 8, device="meta")
    assert (is_for(x, linear), is_for(x, linear, normed=True)) == wanted
    assert not is_for(x, nn.Sequential(linear))
