"""The threshold found by searching is that found by sorting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batching.worker import sampling, threshold_kernel
from batching.worker.device import choose_device
from batching.worker.sampling import Draws, find_threshold
from batching.worker.threshold_kernel import PIECE, search_threshold

DEVICE = choose_device("auto")
ROWS = 4
OFF = 1 << 20


def logits(seed: int, count: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(ROWS, count, generator=generator)
    if kind == "flat":
        drawn *= 1e-3
    elif kind == "peaked":
        drawn *= 30
    elif kind == "equal":  # ties, and sums that are exact
        drawn = drawn.round() * torch.tensor(2.0).log()
    elif kind == "banned":
        drawn[torch.rand(ROWS, count, generator=generator) < 0.7] = -torch.inf
        drawn[:, 0] = -0.0
    return drawn.to(DEVICE)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    count=st.sampled_from([1, 37, 600, PIECE + 1]),
    kind=st.sampled_from(["plain", "flat", "peaked", "equal", "banned"]),
    top_k=st.none() | st.lists(st.sampled_from([1, 2, 5, 30, OFF]), min_size=ROWS, max_size=ROWS),
    top_p=st.lists(
        st.sampled_from([0.0, 1e-6, 0.1, 0.3, 0.77, 0.95, 0.9999, 1.0]),
        min_size=ROWS, max_size=ROWS,
    ),
)  # fmt: skip
def test_searching_finds_what_sorting_does(
    seed: int, count: int, kind: str, top_k: list[int] | None, top_p: list[float]
) -> None:
    scaled = logits(seed, count, kind)
    limits = None
    if top_k is not None:
        limits = torch.tensor(top_k, device=DEVICE).clamp(max=count)
    nothing = torch.empty(0)
    draws = Draws(nothing, nothing, nothing, limits, torch.tensor(top_p, device=DEVICE))
    expected = find_threshold(scaled, scaled.topk(count, dim=-1).values, draws)
    got = search_threshold(scaled, draws.top_k, draws.top_p)
    assert torch.equal(scaled < got, scaled < expected)


def test_a_large_vocabulary() -> None:
    scaled = logits(3, 50_000, "plain")[:2] * 3
    nothing = torch.empty(0)
    draws = Draws(nothing, nothing, nothing, top_p=torch.tensor([0.9, 0.5], device=DEVICE))
    expected = find_threshold(scaled, scaled.sort(dim=-1, descending=True).values, draws)
    got = search_threshold(scaled, None, draws.top_p)
    # Sums of so many numbers in another order may end one token sooner or later.
    assert ((scaled < got).sum(1) - (scaled < expected).sum(1)).abs().max() <= 1


def test_accelerators_with_triton_search(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def note(scaled: torch.Tensor, *limits: Any) -> torch.Tensor:
        asked.append(limits)
        return scaled[:, :1]

    monkeypatch.setattr(sampling, "has_triton", lambda device: True)
    monkeypatch.setattr(threshold_kernel, "search_threshold", note)
    meta = torch.empty(3, device="meta")
    keys = torch.empty(3, 2, dtype=torch.int32, device="meta")
    some = torch.empty(3, dtype=torch.int64, device="meta")
    for draws, count in (
        (Draws(some, meta, keys, top_p=meta), 1),
        (Draws(some, meta, keys, top_k=some, top_p=meta, max_k=5), 2),
        (Draws(some, meta, keys, top_k=some, max_k=5), 2),  # no more than these are sorted
    ):
        assert sampling.draw(torch.empty(3, 50, device="meta"), draws).shape == (3,)
        assert len(asked) == count
