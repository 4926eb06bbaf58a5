"""The Triton backend against float64 definitions: on a GPU where there is one, else interpreted.

Triton's interpreter cannot multiply bfloat16; float16 stands for it.
"""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from typing import Any

import pytest
import torch

from batching.worker import attention_triton
from batching.worker.attention import AttentionBackend, LayerSpec
from batching.worker.attention_triton import TritonAttention
from batching.worker.attention_work import FIELDS, divide
from batching.worker.device import choose_device
from tests.conftest import HAS_GPU
from tests.worker.paged_case import Case, spec_of

DEVICE = choose_device("auto")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1 / 512, torch.bfloat16: 1 / 128}
SPLIT = 64  # so that short contexts are split
RAGGED = [(1, 1), (37, 1), (40, 40), (130, 1), (70, 20), (65, 2)]


pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # rows that nobody asked for


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> TritonAttention:
    monkeypatch.setattr(attention_triton, "SPLIT_TOKENS", SPLIT)
    return TritonAttention(DEVICE)


def case_of(*values: Any, **rest: Any) -> Case:
    return Case(*values, **rest, device=DEVICE)


def check(case: Case, backend: AttentionBackend, tolerance: float | None = None) -> None:
    tolerance = tolerance or TOLERANCES[case.dtype]
    for got, expected in zip(case.run(backend), case.expected(), strict=True):
        assert got.dtype == case.dtype and got.is_contiguous()
        torch.testing.assert_close(got.double().cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 256])
def test_head_sizes(backend: TritonAttention, head_dim: int, dtype: torch.dtype) -> None:
    check(case_of(spec_of(2, 1, head_dim), RAGGED, dtype=dtype), backend)


@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 16, 24])
def test_heads_sharing_a_kv_head(backend: TritonAttention, group: int) -> None:
    check(case_of(spec_of(group * 2, 2, 8), [(1, 1), (20, 9), (66, 1)]), backend)


@pytest.mark.parametrize("block_size", [1, 6, 32, 64, 128])
def test_block_sizes(backend: TritonAttention, block_size: int) -> None:
    check(case_of(spec_of(2, 1, 16), RAGGED, block_size), backend)


@pytest.mark.parametrize("window", [1, 2, 36, 37, 38, 64, 65, 69, 70, 71, 129, 130])
def test_windows(backend: TritonAttention, window: int) -> None:
    check(case_of(spec_of(2, 1, 16, window=window), RAGGED), backend)


@pytest.mark.parametrize("window", [None, 50])
def test_softcap_and_sinks(backend: TritonAttention, window: int | None) -> None:
    sinks = torch.tensor([3.0, -1.0, 0.0, 8.0])
    spec = spec_of(4, 2, 16, softcap=1.5, sinks=sinks, window=window)
    check(case_of(spec, RAGGED), backend)


def test_every_context_around_the_borders(backend: TritonAttention) -> None:
    borders = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
    check(case_of(spec_of(2, 1, 16), [(n, 1) for n in borders]), backend)


def test_more_splits_than_are_joined_at_once(backend: TritonAttention) -> None:
    check(case_of(spec_of(1, 1, 8), [(16 * SPLIT + 1, 1)]), backend)
    assert not backend._arrived.any()


def test_long_sequences_have_long_splits(
    backend: TritonAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_most_splits", 3)
    check(case_of(spec_of(6, 2, 8), [(3 * SPLIT + 1, 1), (9 * SPLIT, 1), (SPLIT, 1)]), backend)


def test_scores_far_apart(backend: TritonAttention) -> None:
    """Weights that underflow, and a running maximum that jumps by hundreds: scores of a thousand,
    whose float32 spacing of 6e-5 becomes a relative error of the weights."""
    check(case_of(LayerSpec(2, 1, 64, 40.0), RAGGED), backend, tolerance=1e-3)


def test_strided_views(backend: TritonAttention) -> None:
    """Query, key and value as views of one merged projection, heads not even adjacent."""
    case = case_of(spec_of(4, 2, 16), [(70, 70)])
    expected = case.run(backend)
    merged = torch.full((70, 10, 48), torch.nan, device=case.query[0].device)
    case.query[0] = merged[:, :4, 8:24].copy_(case.query[0])
    case.key[0] = merged[:, 4:8:2, 8:24].copy_(case.key[0])
    case.value[0] = merged[:, 5:9:2, 8:24].copy_(case.value[0])
    assert torch.equal(case.run(backend)[0], expected[0])


@pytest.mark.parametrize("window", [None, 50])
def test_bits_do_not_depend_on_the_batch(backend: TritonAttention, window: int | None) -> None:
    case = case_of(spec_of(4, 2, 16, window=window), RAGGED)
    together = case.run(backend)
    for alone, crowd in zip(case.one_by_one(backend), together, strict=True):
        assert torch.equal(alone, crowd)


@pytest.mark.parametrize(
    "window, most, splits",
    [
        (None, 9, {41: [0, 1, 2], 45: [3, 4]}),
        (None, 2, {41: [0, 1], 45: [2, 3]}),
        (1, 9, {}),
        (600, 9, {41: [0, 1], 45: [2, 3]}),
    ],
)
def test_work_covers_every_key_of_every_query_once(
    window: int | None, most: int, splits: dict[int, list[int]]
) -> None:
    """`splits` has the partial results of each token that has any."""
    counts, contexts = [1, 40, 1, 3, 1], [1, 45, 1300, 3, 513]
    work = divide(counts, contexts, queries=16, keys=64, split=512, most=most, window=window)
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in [*work.tiles.tolist(), *work.singles.tolist()]:
        sequence, token, queries, position, first, end, _, _ = row
        if counts[sequence] == 1:
            queries = 1  # that field has something else
        start = contexts[sequence] - counts[sequence]
        assert token == sum(counts[:sequence]) + position - start
        for p in range(position, position + queries):
            oldest = 0 if window is None else max(0, p + 1 - window)
            seen[sequence, p] += range(max(first, oldest), min(end, p + 1))
    assert len(seen) == sum(counts)
    for (_, position), keys in seen.items():
        oldest = 0 if window is None else max(0, position + 1 - window)
        assert sorted(keys) == list(range(oldest, position + 1))
    found = defaultdict(list)
    for _, token, count, _, _, _, partial, first in sorted(work.singles.tolist()):
        if partial < 0:
            assert count == 1
        else:
            assert [count, first] == [len(splits[token]), splits[token][0]]
            found[token].append(partial)
    assert found == splits and work.partials == sum(map(len, splits.values()))
    assert work.table().shape == (1 + len(work.tiles) + len(work.singles), FIELDS)


def test_refusals_name_the_reason(backend: TritonAttention) -> None:
    assert backend.refuses(spec_of(4, 2, 64), torch.bfloat16) is None
    assert "float64" in str(backend.refuses(spec_of(4, 2, 64), torch.float64))
    assert "head size 288" in str(backend.refuses(spec_of(4, 2, 288), torch.float16))
    assert "groups" in str(backend.refuses(spec_of(5, 2, 64), torch.float32))


def test_page_bytes_are_what_is_allocated(backend: TritonAttention) -> None:
    spec = spec_of(6, 3, 72)
    pages = backend.allocate(spec, 5, 16, torch.float16)
    assert sum(page.nbytes for page in pages) == 5 * backend.page_bytes(spec, 16, torch.float16)


def test_partial_results_find_room(backend: TritonAttention) -> None:
    """However long the sequences: splits grow before memory does."""
    specs = [spec_of(8, 2, 64), spec_of(8, 2, 128, window=64)]
    for spec in specs:
        backend.allocate(spec, 1, 16, torch.float16)
    backend.reserve(specs, 64, 1 << 20)
    assert backend._room.nbytes <= attention_triton.ROOM_BYTES
    for kind, division in backend.divide([1] * 64, [1 << 20] * 64, specs).items():
        assert division.partials * kind[0] * (kind[2] + 2) <= len(backend._room)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_the_kernels_compile_for_gpus() -> None:
    """For GPUs that are not here: without spilled registers, within their shared memory."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.worker.compile_kernels"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
