"""Sampling against float64 definitions: distributions by chi-square, each parameter's effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from batching.core.types import SamplingParams, SlotInit
from batching.worker.noise import draw_keys, gumbel
from batching.worker.sampler_state import SamplerState
from batching.worker.sampling import find_threshold, sample, take_largest, take_noisiest

VOCAB = 40
CPU = torch.device("cpu")
# Logits with ties, as bfloat16 heads give them.
LOGITS = (torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2).bfloat16().float()
DRAWS = 20_000


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, **values})


def nothing_before(slots: Sequence[int], ends: Sequence[int], count: int) -> torch.Tensor:
    """For sequences without bad words."""
    raise AssertionError


def state_of(
    *each: SamplingParams, tokens: list[int] | None = None, prompt: int = 1
) -> SamplerState:
    """A sampler whose slots 0, 1, … hold sequences with these parameters."""
    state = SamplerState(VOCAB, CPU, nothing_before)
    for slot, one in enumerate(each):
        state.begin(SlotInit(slot, f"r{slot}", tokens or [0], prompt, one))
    return state


def probabilities(logits: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """The distribution that the parameters leave, by definition, in float64."""
    scaled = logits.double() / p.temperature
    share = scaled.softmax(-1)
    kept = share >= p.min_p * share.max()
    if 0 < p.top_k < VOCAB:
        kept &= (
            scaled >= scaled.masked_fill(~kept, -torch.inf).sort(descending=True)[0][p.top_k - 1]
        )
    share = torch.where(kept, share, 0) / share[kept].sum()
    order = share.argsort(descending=True)
    before = share[order].cumsum(0) - share[order]
    smallest = share[order][before < p.top_p].min()
    share = torch.where(share >= smallest, share, 0)
    return share / share.sum()


def draw_many(p: SamplingParams, count: int = DRAWS) -> torch.Tensor:
    """How often each token comes up, over `count` positions of one seed."""
    state = state_of(p)
    batch = 1000
    histogram = torch.zeros(VOCAB, dtype=torch.int64)
    for first in range(1, count, batch):
        inputs = state.inputs([0] * batch, range(first, first + batch))
        histogram += sample(LOGITS.repeat(batch, 1), inputs).bincount(minlength=VOCAB)
    return histogram


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 10, "top_p": 0.8, "temperature": 1.3},
        {"min_p": 0.02, "top_k": 12, "top_p": 0.9},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(values: dict[str, Any]) -> None:
    p = params(seed=11, **values)
    observed, expected = draw_many(p).double(), probabilities(LOGITS, p) * DRAWS
    assert not observed[expected == 0].any()
    often = expected >= 5
    groups = [(observed[often], expected[often])]
    rare = (expected > 0) & ~often
    if rare.any() and expected[rare].sum() >= 5:
        groups.append((observed[rare].sum()[None], expected[rare].sum()[None]))
    statistic = sum(float(((o - e) ** 2 / e).sum()) for o, e in groups)
    freedom = sum(len(o) for o, _ in groups) - 1
    # 99.9 % point of chi-square (Wilson & Hilferty 1931)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < limit


def test_temperature_zero_takes_the_most_likely() -> None:
    inputs = state_of(params(temperature=0.0)).inputs([0], [1])
    assert not inputs.draws
    assert sample(LOGITS[None].clone(), inputs).tolist() == [int(LOGITS.argmax())]


def test_top_k_one_is_greedy() -> None:
    distinct = LOGITS + torch.arange(VOCAB) * 1e-3
    inputs = state_of(params(top_k=1, temperature=5.0)).inputs([0] * 50, range(50))
    assert set(sample(distinct.repeat(50, 1), inputs).tolist()) == {int(distinct.argmax())}


def test_a_draw_does_not_depend_on_the_batch() -> None:
    mine = params(seed=5, top_p=0.9)
    others = [
        params(seed=1, top_k=3),
        params(temperature=0.0),
        params(seed=2, frequency_penalty=1.5),
        params(seed=3),
        params(seed=4, logit_bias=((3, 5.0),)),
    ]
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(2))
    company = state_of(mine, *others)
    alone = state_of(mine)
    for position in range(1, 60):
        together = sample(logits.clone(), company.inputs(range(6), [position] * 6))
        single = sample(logits[:1].clone(), alone.inputs([0], [position]))
        assert together[0] == single[0]


def test_seeds_and_positions_change_the_draw() -> None:
    state = state_of(params(seed=1), params(seed=2))
    logits = torch.zeros(2, VOCAB)
    rows = [sample(logits.clone(), state.inputs([0, 1], [i, i])).tolist() for i in range(200)]
    first, second = zip(*rows, strict=True)
    assert len(set(first)) > VOCAB / 2
    assert first != second


def test_logit_bias_adds() -> None:
    p = params(temperature=0.0, logit_bias=((7, 100.0), (8, -100.0)))
    logits = torch.zeros(1, VOCAB)
    assert sample(logits, state_of(p).inputs([0], [1])).tolist() == [7]
    assert logits[0, 7] == 100 and logits[0, 8] == -100 and logits[0].count_nonzero() == 2


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_only_allowed_tokens_are_generated(temperature: float) -> None:
    """Whatever the others' logits are; rows beside are left alone."""
    free = params(temperature=0.0)
    p = params(temperature=temperature, allowed_token_ids=(3, 9), logit_bias=((5, 100.0),))
    state = state_of(free, p)
    rows = [
        sample(LOGITS.repeat(2, 1), state.inputs([0, 1], [i, i])).tolist() for i in range(1, 50)
    ]
    first, second = zip(*rows, strict=True)
    assert set(first) == {int(LOGITS.argmax())}
    assert set(second) == ({3, 9} if temperature else {max((3, 9), key=lambda i: LOGITS[i])})


def test_stop_tokens_are_banned_until_min_tokens() -> None:
    best = int(LOGITS.argmax())
    p = params(temperature=0.0, stop_token_ids=(best, 3), min_tokens=2)
    state = state_of(p, tokens=[0, 0, 0], prompt=3)
    tokens = [sample(LOGITS[None].clone(), state.inputs([0], [end]))[0] for end in (3, 4, 5)]
    assert [token == best for token in tokens] == [False, False, True]


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 0.9},
        {"frequency_penalty": 0.6},
        {"repetition_penalty": 0.8, "presence_penalty": -0.5, "frequency_penalty": 0.3},
    ],
    ids=str,
)
def test_penalties_match_their_definition(values: dict[str, float]) -> None:
    prompt, generated = [1, 2, 3, 3], [3, 5, 5, 5, 8]
    p = params(temperature=0.0, **values)
    state = state_of(p, tokens=prompt + generated, prompt=len(prompt))
    logits = LOGITS[None].clone()
    sample(logits, state.inputs([0], [9]))
    for token in range(VOCAB):
        value = float(LOGITS[token])
        if token in prompt + generated:
            value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        count = generated.count(token)
        value -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
        assert float(logits[0, token]) == pytest.approx(value, abs=1e-5)


def test_incremental_counts_equal_recomputed_ones() -> None:
    each = [
        params(seed=1, frequency_penalty=0.5),
        params(temperature=0.0),
        params(seed=2, repetition_penalty=1.3, presence_penalty=0.2),
    ]
    rows: list[list[int]] = [[4, 4], [5], [6, 7, 8]]
    prompts = [len(row) for row in rows]
    state = SamplerState(VOCAB, CPU, nothing_before)
    for slot, (row, p) in enumerate(zip(rows, each, strict=True)):
        state.begin(SlotInit(slot, f"r{slot}", list(row), len(row), p))
    for step in range(30):
        logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(step))
        ends = [len(row) for row in rows]
        fresh = SamplerState(VOCAB, CPU, nothing_before)
        for slot, p in enumerate(each):
            fresh.begin(SlotInit(slot, f"r{slot}", list(rows[slot]), prompts[slot], p))
        changed, expected = logits.clone(), logits.clone()
        tokens = sample(changed, state.inputs([0, 1, 2], ends))
        state.record(tokens)
        assert torch.equal(tokens, sample(expected, fresh.inputs([0, 1, 2], ends)))
        assert torch.equal(changed, expected)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)


def test_a_slot_forgets_its_former_counts() -> None:
    p = params(temperature=0.0, presence_penalty=2.0)
    state = state_of(p, tokens=[0, 1, 2], prompt=1)
    state.begin(SlotInit(0, "next", [3], 1, params(temperature=0.0)))
    state.begin(SlotInit(1, "other", [3], 1, p))
    logits = LOGITS.repeat(2, 1)
    sample(logits, state.inputs([0, 1], [1, 1]))
    assert torch.equal(logits, LOGITS.repeat(2, 1))


@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0, 3.0])
@pytest.mark.parametrize("values", [{"top_p": 0.9}, {"top_k": 400}, {"top_k": 700, "top_p": 0.8}])
def test_looking_at_few_candidates_first_changes_nothing(
    spread: float, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = torch.randn(40, 3000, generator=torch.Generator().manual_seed(4)) * spread
    wide[::2] *= 10  # rows that need few, beside rows that need many
    state = SamplerState(3000, CPU, nothing_before)
    for slot in range(40):
        state.begin(SlotInit(slot, "r", [0], 1, params(seed=slot, **values)))
    inputs = state.inputs(range(40), [1] * 40)
    narrow = sample(wide.clone(), inputs)
    monkeypatch.setattr("batching.worker.sampling.FIRST_WIDTH", 3000)
    assert torch.equal(sample(wide.clone(), inputs), narrow)


@pytest.mark.parametrize("spread", [0.0, 0.05, 3.0])
def test_a_wide_nucleus_has_the_size_of_its_definition(spread: float) -> None:
    wide = torch.randn(2, 3000, generator=torch.Generator().manual_seed(4)) * spread
    state = SamplerState(3000, CPU, nothing_before)
    state.begin(SlotInit(0, "r", [0], 1, params(top_p=0.9)))
    (draws,) = state.inputs([0, 0], [1, 2]).draws
    ordered = wide.sort(descending=True).values
    kept = (wide >= find_threshold(wide, ordered, draws)).sum(dim=-1)
    share = ordered.double().softmax(-1)
    size = (share.cumsum(-1) - share < 0.9 - 1e-7).sum(-1) if spread else torch.tensor(3000)
    # float32 sums of thousands of terms may move the edge of a flat nucleus by a few tokens
    assert ((kept - size).abs() <= 5).all()


@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_the_noisiest_token_is_that_of_the_full_noise(spread: float) -> None:
    generator = torch.Generator().manual_seed(6)
    scaled = torch.randn(400, 500, generator=generator) * spread
    scaled[:, ::3] = -torch.inf
    keys = draw_keys(list(range(400)), [3] * 400)
    full = (gumbel(keys, torch.arange(500, dtype=torch.int32)) + scaled).argmax(-1)
    assert torch.equal(take_noisiest(scaled, keys), full)


def test_the_full_noise_is_used_where_no_token_passes_the_short_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scaled, keys = torch.zeros(50, 300), draw_keys(list(range(50)), [3] * 50)
    expected = take_noisiest(scaled, keys)
    monkeypatch.setattr("batching.worker.sampling.SLACK", -3.0)  # now most rows have none
    assert torch.equal(take_noisiest(scaled, keys), expected)


@pytest.mark.parametrize("length", [1000, 1024, 1055])
def test_largest_elements_with_ties(length: int) -> None:
    rows = torch.randint(40, (30, length), generator=torch.Generator().manual_seed(8)).float()
    values, indices = take_largest(rows, 10)
    assert torch.equal(values, rows.topk(10).values)
    assert torch.equal(rows.gather(1, indices), values)
    assert all(len(set(row)) == 10 for row in indices.tolist())


def test_bad_words_are_never_completed() -> None:
    """Only of generated tokens, and each row for itself."""
    words = ((3, 4, 5), (6,), (4, 7))
    said = {0: [3, 4], 1: [9, 3, 4], 2: [4, 3], 3: [3, 4], 4: [3, 4]}
    prompts = {0: 0, 1: 1, 2: 0, 3: 1, 4: 2}  # of these so many are the prompt's

    def before(slots: Sequence[int], ends: Sequence[int], count: int) -> torch.Tensor:
        pairs = zip(slots, ends, strict=True)
        return torch.tensor([([-2] * count + said[s][:end])[-count:] for s, end in pairs])

    state = SamplerState(VOCAB, CPU, before)
    for slot, tokens in said.items():
        one = params(temperature=0.0, bad_words=words, logit_bias=((6, 5.0),))
        state.begin(SlotInit(slot, "r", tokens, prompts[slot], one))
    state.begin(SlotInit(5, "r", [3, 4], 0, params(temperature=0.0)))
    logits = torch.zeros(6, VOCAB)
    sample(logits, state.inputs(range(6), [2, 3, 2, 2, 2, 2]))
    banned = [(row < -1e29).nonzero()[:, 0].tolist() for row in logits]
    assert banned == [[5, 6, 7], [5, 6, 7], [6], [6, 7], [6], []]


def test_a_bad_word_is_said_where_nothing_else_may_be() -> None:
    one = params(seed=1, bad_words=((6,),), allowed_token_ids=(6,))
    state = SamplerState(VOCAB, CPU, lambda slots, ends, count: torch.zeros(1, 0))
    state.begin(SlotInit(0, "r", [0], 1, one))
    assert sample(torch.zeros(1, VOCAB), state.inputs([0], [1])).tolist() == [6]
