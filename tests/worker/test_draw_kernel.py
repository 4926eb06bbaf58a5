"""Drawing by the kernel gives the tokens of `sampling.draw`, and keeps what sorting keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from batching.core.types import SamplingParams, SlotInit
from batching.worker import draw_kernel, sampler_state, sampling
from batching.worker.device import choose_device
from batching.worker.draw_kernel import least_kept
from batching.worker.noise import draw_keys
from batching.worker.sampler_state import SamplerState
from batching.worker.sampling import Draws, SamplingInputs, draw, find_threshold, sample

DEVICE = choose_device("auto")
ROWS, COUNT = 8, 300
PIECE = 128  # so that a row has several, the last one incomplete
OFF = COUNT  # top-k
SHARES = (0.0, 1e-6, 0.1, 0.3, 0.77, 0.95, 0.9999, 1.0)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_kernel, "PIECE", PIECE)
    monkeypatch.setattr(draw_kernel, "NOISE_PIECE", PIECE // 2)


@triton.jit
def write_least_kept(
    logits: tl.tensor, temperature: tl.tensor, top_k: tl.tensor, top_p: tl.tensor,
    output: tl.tensor, COUNT: tl.constexpr, PIECE: tl.constexpr,
) -> None:  # fmt: skip
    draw = tl.program_id(0)
    heat, floor = tl.load(temperature + draw), -float("inf")
    count, share = tl.load(top_k + draw), tl.load(top_p + draw)
    kept = least_kept(logits + draw * COUNT, heat, count, share, floor, COUNT, PIECE)
    tl.store(output + draw, kept)


def logits_of(kind: str, rows: int = ROWS, count: int = COUNT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(rows, count, generator=generator) * 2
    if kind == "flat":
        drawn *= 1e-3
    elif kind == "peaked":
        drawn *= 30
    elif kind == "equal":  # many ties, and probabilities whose sums are exact
        drawn = drawn.round() * torch.tensor(2.0).log()
    elif kind == "banned":
        drawn[torch.rand(rows, count, generator=generator) < 0.7] = -torch.inf
        drawn[:, 0] = -0.0
        drawn[:, 1] = -1e30
    return drawn.to(DEVICE)


def draws_of(rows: int, **limits: torch.Tensor | None) -> Draws:
    heat = torch.linspace(0.3, 1.5, rows, device=DEVICE)
    keys = draw_keys(range(rows), range(7, 7 + rows)).to(DEVICE)
    which = torch.arange(rows, device=DEVICE)
    given: dict[str, Any] = {k: None if v is None else v.to(DEVICE) for k, v in limits.items()}
    top_k = given.get("top_k")
    return Draws(which, heat, keys, **given, max_k=0 if top_k is None else COUNT - 1)


@pytest.mark.parametrize("kind", ["plain", "flat", "peaked", "equal", "banned"])
@pytest.mark.parametrize("top_k", [(OFF,) * ROWS, (1, 2, 5, 30, OFF, OFF, 299, 30)])
def test_what_is_kept_is_what_sorting_keeps(kind: str, top_k: tuple[int, ...]) -> None:
    logits = logits_of(kind)
    draws = draws_of(ROWS, top_k=torch.tensor(top_k), top_p=torch.tensor(SHARES))
    if kind == "equal":
        draws.temperature.fill_(1.0)
    scaled = logits / draws.temperature[:, None]
    expected = find_threshold(scaled, scaled.topk(COUNT, dim=-1).values, draws)
    got = torch.empty(ROWS, 1, device=DEVICE)
    write_least_kept[(ROWS,)](
        logits, draws.temperature, draws.top_k, draws.top_p, got, COUNT=COUNT, PIECE=PIECE
    )
    # Where nothing is left out, minus infinity may be: it is never drawn.
    kept, wanted = logits >= got, (scaled >= expected) & ~logits.isneginf()
    assert torch.equal(kept & ~logits.isneginf(), wanted)


LIMITS: list[dict[str, torch.Tensor]] = [
    {},
    {"top_k": torch.tensor([1, 2, 5, 30, OFF, OFF, 299, 30] * 2)},
    {"top_p": torch.tensor(SHARES * 2)},
    {"min_p": torch.tensor([0.0, 0.02, 0.2, 1.0] * 4)},
    {
        "top_k": torch.tensor([OFF, 40, 3, 100] * 4),
        "top_p": torch.tensor(SHARES * 2),
        "min_p": torch.tensor([0.0, 0.0, 0.002] * 5 + [0.3]),
    },
]


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: "+".join(limits) or "free")
def test_tokens_are_those_of_the_other_way(
    limits: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = draws_of(16, **limits)
    logits = logits_of("plain", 32)
    draws.rows = draws.rows * 2 + 1  # of rows some are drawn, the others are greedy
    expected = logits.argmax(dim=-1)
    expected[draws.rows] = draw(logits[draws.rows], draws)
    monkeypatch.setattr(sampling, "has_triton", lambda device: True)
    before = logits.clone()
    got = sample(logits, SamplingInputs(draws=(draws,)))
    assert torch.equal(got, expected)
    assert torch.equal(logits, before)
    alone = [sample(logits[i : i + 1], one_row(draws, i // 2)) for i in (1, 17)]
    assert [int(token) for token in alone] == [int(got[1]), int(got[17])]


def one_row(draws: Draws, index: int) -> SamplingInputs:
    one = draws.select(slice(index, index + 1))
    one.rows = torch.zeros_like(one.rows)
    return SamplingInputs(draws=(one,))


def test_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_kernel, "PIECE", 1 << 15)
    count = 50_000
    logits = logits_of("plain", 2, count)
    draws = draws_of(2, top_k=torch.full((2,), count), top_p=torch.tensor([0.9, 0.5]))
    scaled = logits / draws.temperature[:, None]
    expected = find_threshold(scaled, scaled.sort(dim=-1, descending=True).values, draws)
    got = torch.empty(2, 1, device=DEVICE)
    write_least_kept[(2,)](
        logits, draws.temperature, draws.top_k, draws.top_p, got, COUNT=count, PIECE=1 << 15
    )
    # Sums of so many numbers in another order may end one logit sooner or later.
    assert ((logits >= got).sum(1) - (scaled >= expected).sum(1)).abs().max() <= 1


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_broken_rows_end_with_some_token(value: float) -> None:
    logits = torch.full((3, COUNT), value, device=DEVICE)
    logits[1, 5:9] = 1.0
    top_k = torch.tensor([3, 3, 3])
    draws = draws_of(3, top_k=top_k, top_p=torch.full((3,), 0.5), min_p=torch.zeros(3))
    tokens = torch.full((3,), -1, device=DEVICE)
    draw_kernel.draw_into(tokens, logits, draws)
    assert all(0 <= token < COUNT for token in tokens.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_drawn_as_without_the_kernel(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its parameters in one upload, and from logits as the head gives them."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.8},
        {"temperature": 0.0},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.7, "top_p": 0.8, "seed": (1 << 64) - 1},
        {"temperature": 1.0, "min_p": 0.1, "seed": -3},
    ]
    logits = logits_of("plain", len(kinds)).to(dtype)
    for chosen in ([0, 1, 2, 3, 4], [1, 0], [4], [2, 3], [0, 4, 1], [1]):
        state = SamplerState(COUNT, DEVICE, lambda slots, ends, count: torch.zeros(1, 0))
        for slot in chosen:
            params = SamplingParams(**{"max_tokens": 9, "seed": slot, **kinds[slot]})
            state.begin(SlotInit(slot, "r", [1], 1, params))
        ends = [7 * slot + 3 for slot in chosen]
        expected = sample(logits[chosen].float(), state.inputs(chosen, ends))
        with monkeypatch.context() as patch:
            for module in (sampling, sampler_state):
                patch.setattr(module, "has_triton", lambda device: True)
            how = state.inputs(chosen, ends)
            assert how.keeps_logits() and len(how.draws) == (chosen != [1])
            assert torch.equal(sample(logits[chosen], how), expected)
