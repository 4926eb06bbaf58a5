"""Inputs made by kernels are those that torch makes, in new memory or in a recording's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from batching.core.types import SequencePlan, SlotInit, StepPlan
from batching.worker import attention_triton, device, triton_slots
from batching.worker.attention import AttentionMetadata
from batching.worker.attention_triton import TritonAttention, Work, kind_of
from batching.worker.attention_work import FIELDS
from batching.worker.device import choose_device
from batching.worker.slots import SlotTables, StepInputs
from batching.worker.triton_slots import Place, TritonSlots
from tests.worker.paged_case import spec_of
from tests.worker.test_slots import BLOCK, MAX_LEN, PARAMS, SPARE, Plans, limits_of

DEVICE = choose_device("auto")
SLOTS = 6
LARGEST = 100  # tokens of a recorded step
SPECS = [spec_of(2, 1, 16), spec_of(2, 1, 16, window=9), spec_of(2, 1, 16)]
KINDS = list(dict.fromkeys(map(kind_of, SPECS)))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> TritonAttention:
    monkeypatch.setattr(attention_triton, "SPLIT_TOKENS", 16)  # so that contexts are split
    backend = TritonAttention(DEVICE)
    for spec in SPECS:
        backend.allocate(spec, 1, BLOCK, torch.float32)
    return backend


def slots_of(backend: TritonAttention, max_len: int = MAX_LEN) -> TritonSlots:
    return TritonSlots(limits_of(SLOTS, max_len), DEVICE, backend, SPECS)


class Recorded:
    """Stands for recordings: places for steps of certain sizes, all in the same memory."""

    def __init__(self, slots: TritonSlots, inbox: int) -> None:
        self._slots, self._long = slots, torch.zeros(3, LARGEST, dtype=torch.int64, device=DEVICE)
        rows = 1 + SLOTS + LARGEST + 5 * SLOTS
        self.tables = [
            torch.zeros(rows * FIELDS + inbox, dtype=torch.int32, device=DEVICE) for _ in KINDS
        ]

    def __call__(self, tokens: int, sequences: int) -> Place | None:
        size = next((s for s in (4, 16, LARGEST) if s >= tokens), None)
        if size is None:
            return None
        schedule = {k: Work(t, 1, 1) for k, t in zip(KINDS, self.tables, strict=True)}
        packed, positions, places = self._long[:, :size]
        metadata = AttentionMetadata(
            packed[:0], packed[:0], self._slots.tables, places, BLOCK, [], [], schedule
        )
        return Place(packed, positions, metadata, self.tables[0])


def check(got: StepInputs, expected: StepInputs, slots: list[int], backend: Any) -> None:
    """The same, padded by dummies; and the same work, of sequences that are named by slots."""
    count = len(expected.tokens)
    assert torch.equal(got.tokens[:count], expected.tokens)
    assert torch.equal(got.positions[:count], expected.positions)
    places, real = got.metadata.slot_mapping, expected.metadata.slot_mapping
    assert torch.equal(places[:count], real)
    assert got.tokens.dtype == got.positions.dtype == places.dtype == torch.int64
    assert not got.positions[count:].any() and (places[count:] == SPARE * BLOCK).all()
    assert got.sampled == expected.sampled
    packed = torch.arange(len(got.tokens), device=DEVICE)[:, None]
    assert torch.equal(got.last(packed), expected.last(packed[:count]))
    assert torch.equal(got.slots.long(), expected.slots)
    assert torch.equal(got.ends.long(), expected.ends)
    prepared = backend.prepare(expected.metadata, SPECS)
    assert list(got.metadata.schedule) == list(prepared) == KINDS
    for kind, work in prepared.items():
        named = got.metadata.schedule[kind]
        rows = work.table.clone()
        rows[1:, 0] = torch.tensor(slots, device=DEVICE)[rows[1:, 0].long()]
        assert torch.equal(named.table.view(-1)[: rows.numel()], rows.view(-1))


@pytest.mark.parametrize("recorded", [None, 0, 500], ids=["new", "no room", "recorded"])
def test_inputs_are_those_that_torch_makes(backend: TritonAttention, recorded: int | None) -> None:
    plain, fused = SlotTables(limits_of(SLOTS), DEVICE), slots_of(backend)
    if recorded is not None:
        fused.place = Recorded(fused, recorded)
    plans = Plans(SLOTS)
    for number in range(50):
        plan = plans.next(decode=number % 4 == 3)
        if not plan.sequences:
            continue
        for slots in (plain, fused):
            slots.begin(plan.inits)
        got, expected = fused.build(plan), plain.build(plan)
        check(got, expected, [s.slot for s in plan.sequences], backend)
        tokens = plans.sampled(plan).to(DEVICE)
        plain.append(expected.slots, expected.ends, tokens)
        fused.append(got.slots, got.ends, tokens)
        assert torch.equal(fused.rows[:SLOTS], plain.rows)
        assert torch.equal(fused.tables[:SLOTS], plain.tables)


def test_a_step_is_one_upload(backend: TritonAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one more for each other kind of layer, where a recording has its work elsewhere."""
    sent: list[int] = []
    upload = device.upload

    def noting(values: Any, *args: Any, **rest: Any) -> torch.Tensor:
        sent.append(len(values))
        return upload(values, *args, **rest)

    for module in (device, triton_slots):
        monkeypatch.setattr(module, "upload", noting)
    slots = slots_of(backend)
    slots.begin([SlotInit(2, "r", [5, 6, 7], 3, PARAMS)])
    slots.build(StepPlan(0, (), (SequencePlan(2, 0, 3, True, (4,)),)))
    assert len(sent) == 1
    slots.place = Recorded(slots, 500)
    slots.build(StepPlan(1, (), (SequencePlan(2, 3, 1, True),)))
    assert len(sent) == 1 + len(KINDS)


def test_pointers_are_aligned(backend: TritonAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled for aligned pointers once, not anew in the middle of serving."""
    slots, seen = slots_of(backend, max_len=8), []
    monkeypatch.setattr(triton_slots, "write_inputs", Noting(seen))
    monkeypatch.setattr(triton_slots, "write_at", Noting(seen))
    for number, count in enumerate((1, 2, 3, 5, 7)):
        slots.begin([SlotInit(number, "r", [1] * count, 1, PARAMS)])
        slots.build(StepPlan(0, (), (SequencePlan(number, 0, count, True, (3, 4)),)))
    pointers = [a for args in seen for a in args if isinstance(a, torch.Tensor)]
    assert len(pointers) == 5 * (4 + 7)
    assert all(pointer.data_ptr() % 16 == 0 for pointer in pointers)


class Noting:
    """A kernel that only notes its arguments."""

    def __init__(self, seen: list[Any]) -> None:
        self._seen = seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **constants: self._seen.append(args)
