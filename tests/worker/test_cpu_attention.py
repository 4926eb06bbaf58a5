"""The C++ backend against float64 definitions, and its promise about bits."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from batching.worker.attention import LayerSpec
from batching.worker.cpu import build
from batching.worker.cpu.attention import CpuAttention
from tests.worker.builds import EMULATED_AMX, OTHERS, lesser
from tests.worker.paged_case import Case, spec_of

DTYPES = [torch.float32, torch.bfloat16]
# Pages of whole steps of 32 tokens are multiplied on AMX tiles where there are some.
BLOCK_SIZES = [16, 32]
RAGGED = [(1, 1), (37, 1), (130, 130), (515, 1), (600, 88), (16, 16), (129, 2)]


@pytest.fixture(scope="module")
def backend() -> CpuAttention:
    return CpuAttention(torch.device("cpu"))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def check(case: Case, backend: CpuAttention, tolerance: float | None = None) -> None:
    # bfloat16: weights and outputs each round to 8 bits.
    tolerance = tolerance or (2e-6 if case.dtype == torch.float32 else 1 / 128)
    for got, expected in zip(case.run(backend), case.expected(), strict=True):
        assert got.dtype == case.dtype and got.is_contiguous()
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def same_bits(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 8, 20, 32, 64, 72, 80, 96, 128, 256])
def test_head_sizes(backend: CpuAttention, head_dim: int, dtype: torch.dtype) -> None:
    check(Case(spec_of(6, 2, head_dim), RAGGED, dtype=dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 16, 71])
def test_heads_sharing_a_kv_head(backend: CpuAttention, group: int, dtype: torch.dtype) -> None:
    check(Case(spec_of(2 * group, 2, 32), RAGGED, dtype=dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [2, 4, 6, 8, 16, 32, 48, 64, 256])
def test_block_sizes(backend: CpuAttention, block_size: int, dtype: torch.dtype) -> None:
    check(Case(spec_of(4, 2, 32), RAGGED, block_size, dtype), backend)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 2, 8, 36, 37, 38, 127, 128, 129, 514, 515, 516])
def test_windows(backend: CpuAttention, block_size: int, window: int, dtype: torch.dtype) -> None:
    check(Case(spec_of(3, 1, 32, window=window), RAGGED, block_size, dtype), backend)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
def test_softcap_and_sinks(
    backend: CpuAttention, block_size: int, window: int | None, dtype: torch.dtype
) -> None:
    sinks = torch.tensor([3.0, -1.0, 0.0, 8.0])
    spec = spec_of(4, 2, 64, softcap=1.5, sinks=sinks, window=window)
    check(Case(spec, RAGGED, block_size, dtype), backend)


def test_every_context_around_the_borders(backend: CpuAttention) -> None:
    borders = [*range(1, 36), *range(126, 131), *range(510, 515), *range(1022, 1027)]
    for dtype in DTYPES:
        check(Case(spec_of(2, 1, 16), [(n, 1) for n in borders], dtype=dtype), backend)


def test_scores_far_apart(backend: CpuAttention) -> None:
    """Weights that underflow, and a running maximum that jumps by hundreds: scores of a thousand,
    whose float32 spacing of 6e-5 becomes a relative error of the weights."""
    check(Case(LayerSpec(2, 1, 64, 40.0), RAGGED), backend, tolerance=1e-3)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_so_in_its_head(
    backend: CpuAttention, dtype: torch.dtype, block_size: int
) -> None:
    case = Case(spec_of(4, 2, 32), [(300, 40)], block_size, dtype)
    (expected,) = case.run(backend)
    case.query[0][267, 1] = torch.nan
    (got,) = case.run(backend)
    assert got[7, 1].isnan().all()
    got[7, 1] = expected[7, 1]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(backend: CpuAttention, dtype: torch.dtype) -> None:
    """Query, key and value as views of one merged projection, heads not even adjacent."""
    case = Case(spec_of(4, 2, 32), [(70, 70)], dtype=dtype)
    expected = case.run(backend)
    merged = torch.full((70, 10, 48), torch.nan, dtype=dtype)
    case.query[0] = merged[:, :4, 8:40].copy_(case.query[0])
    case.key[0] = merged[:, 4:8:2, 8:40].copy_(case.key[0])
    case.value[0] = merged[:, 5:9:2, 8:40].copy_(case.value[0])
    metadata = case.metadata([(0, 0, 70)])
    metadata.schedule = backend.prepare(metadata, [case.spec])
    pages = case.pages(backend)
    got = backend.forward(case.query[0], case.key[0], case.value[0], pages, case.spec, metadata)
    assert torch.equal(got, expected[0])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 150])
def test_bits_do_not_depend_on_the_batch(
    backend: CpuAttention, block_size: int, window: int | None, dtype: torch.dtype
) -> None:
    case = Case(
        spec_of(6, 2, 64, window=window), [(1300, 1), (700, 80), (3, 3), *RAGGED], block_size, dtype
    )
    together = case.run(backend)
    for alone, crowd in zip(case.one_by_one(backend), together, strict=True):
        assert torch.equal(alone, crowd)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 150])
def test_bits_do_not_depend_on_how_a_prompt_is_cut(
    backend: CpuAttention, block_size: int, window: int | None, dtype: torch.dtype
) -> None:
    case = Case(spec_of(6, 2, 32, window=window), [(700, 700)], block_size, dtype)
    whole = case.run(backend)[0]
    for cut in (1, 13, 64, 300):
        pages = case.pages(backend)
        spans = [(0, first, min(first + cut, 700)) for first in range(0, 700, cut)]
        parts = [case.step(backend, pages, [span])[0] for span in spans]
        assert torch.equal(torch.cat(parts), whole), f"cut into chunks of {cut}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_block_size(backend: CpuAttention, dtype: torch.dtype) -> None:
    """Among those that fill whole steps of 32 tokens, and among the others."""
    for sizes in ((4, 16, 48), (32, 96, 256)):
        results = [Case(spec_of(4, 2, 64), RAGGED, size, dtype).run(backend) for size in sizes]
        for other in results[1:]:
            assert same_bits(results[0], other)


def sharing(
    spec: LayerSpec, block_size: int, dtype: torch.dtype
) -> tuple[Case, list[torch.Tensor]]:
    """Sequences that begin alike in the same blocks, and their outputs with blocks of their own."""
    contexts = [700, 641, 640, 1300, 1281, 300, 257, 256, 40, 768, 700, 2]
    sequences = [(context, 1 + i % 2) for i, context in enumerate(contexts * 3)]
    case = Case(spec, sequences, block_size, dtype)
    begins = [
        (0, 0),
        (0, 640),
        (0, 512),
        (0, 700),
        (3, 1280),
        (0, 256),
        (0, 256),
        (0, 192),
        (0, 32),
    ]
    for s, (of, count) in enumerate(begins):
        for data in (case.key, case.value):
            data[s][:count] = data[of][:count]
    backend = CpuAttention(torch.device("cpu"))
    alone = list(case.one_by_one(backend))
    for s, (of, count) in enumerate(begins):
        blocks = min(count, contexts[s] - 2) // block_size
        case.tables[s, :blocks] = case.tables[of, :blocks]
    return case, alone


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_who_reads_the_same_blocks(
    backend: CpuAttention, block_size: int, window: int | None, threads: int, dtype: torch.dtype
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case, alone = sharing(spec_of(6, 2, 64, window=window), block_size, dtype)
        assert same_bits(case.run(backend), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequences", [[(3000, 1)], [(3000, 1), (2600, 70)]])
def test_bits_do_not_depend_on_threads(
    backend: CpuAttention, sequences: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    """Work enough for a team, in tiles so few that their splits go to different threads."""
    case = Case(spec_of(4, 1, 64, sinks=torch.zeros(4)), sequences, dtype=dtype)
    shared = case.run(backend)
    torch.set_num_threads(1)
    assert same_bits(case.run(backend), shared)
    check(case, backend)


def test_sequences_may_read_what_others_write_in_the_same_step(backend: CpuAttention) -> None:
    case = Case(spec_of(2, 1, 32), [(64, 64), (65, 1)])
    for data in (case.query, case.key, case.value):
        data[1][:64] = data[0]
    case.tables[1, :4] = case.tables[0, :4]
    got = case.step(backend, case.pages(backend), [(1, 64, 65), (0, 0, 64)])
    assert torch.allclose(got[0].double(), case.expected()[1], atol=2e-6)


def test_a_token_without_a_slot_is_not_written(backend: CpuAttention) -> None:
    case = Case(spec_of(2, 1, 32), [(5, 5)])
    metadata = case.metadata([(0, 0, 5)])
    metadata.slot_mapping[3:] = -1
    metadata.schedule = backend.prepare(metadata, [case.spec])
    pages = case.pages(backend)
    backend.forward(case.query[0], case.key[0], case.value[0], pages, case.spec, metadata)
    assert (~pages[0].isnan()).sum() == (~pages[1].isnan()).sum() == 3 * 32


def test_layers_of_different_shapes_share_a_step(backend: CpuAttention) -> None:
    specs = [spec_of(4, 2, 32), spec_of(4, 2, 32, window=8), spec_of(8, 1, 64)]
    cases = [Case(spec, [(40, 40), (9, 9)]) for spec in specs]
    for case in cases:
        case.tables = cases[0].tables
    metadata = cases[0].metadata([(0, 0, 40), (1, 0, 9)])
    metadata.schedule = backend.prepare(metadata, specs)
    for case in cases:
        parts = [torch.cat(data) for data in (case.query, case.key, case.value)]
        got = backend.forward(*parts, case.pages(backend), case.spec, metadata)
        expected = torch.cat(case.expected())
        assert torch.allclose(got.double(), expected, atol=2e-6)


@pytest.mark.parametrize("target", OTHERS)
def test_other_instruction_sets(target: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The code that lesser CPUs get, where this one can run it."""
    backend = CpuAttention(torch.device("cpu"), *lesser(target, tmp_path_factory))
    for dtype in DTYPES:
        spec = spec_of(6, 2, 80, softcap=5.0, sinks=torch.ones(6), window=400)
        case = Case(spec, RAGGED, dtype=dtype)
        check(case, backend)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_tile_instructions_are_used_right(head_dim: int, tmp_path_factory: Any) -> None:
    """With the tile instructions spelled out in C++, since few machines have them."""
    cache = tmp_path_factory.getbasetemp() / "emulated"
    emulated = CpuAttention(torch.device("cpu"), cache, EMULATED_AMX)
    for group in (1, 3, 16):
        spec = spec_of(2 * group, 2, head_dim, window=400)
        check(Case(spec, RAGGED, 32, torch.bfloat16), emulated)
    case, _ = sharing(spec_of(6, 2, head_dim), 32, torch.bfloat16)
    check(case, emulated)


def test_refusals_name_the_reason(backend: CpuAttention) -> None:
    assert backend.refuses(spec_of(4, 2, 64), torch.bfloat16) is None
    assert "float16" in str(backend.refuses(spec_of(4, 2, 64), torch.float16))
    assert "head size 9" in str(backend.refuses(spec_of(4, 2, 9), torch.bfloat16))
    assert backend.refuses(spec_of(4, 2, 9), torch.float32) is None
    assert "groups" in str(backend.refuses(spec_of(5, 2, 64), torch.float32))
    with pytest.raises(ValueError, match="pairs"):
        backend.allocate(spec_of(4, 2, 64), 1, 3, torch.bfloat16)
    with pytest.raises(OSError, match="CPU"):
        CpuAttention(torch.device("meta"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_page_bytes_are_what_is_allocated(backend: CpuAttention, dtype: torch.dtype) -> None:
    spec = spec_of(6, 3, 72)
    pages = backend.allocate(spec, 5, 16, dtype)
    assert sum(page.nbytes for page in pages) == 5 * backend.page_bytes(spec, 16, dtype)


def resident(tensor: torch.Tensor) -> bool:
    """Whether the system has provided all of a tensor's memory."""
    pages = -(-tensor.nbytes // mmap.PAGESIZE)
    present = (ctypes.c_ubyte * pages)()
    address, size = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
    assert ctypes.CDLL(None).mincore(address, size, present) == 0
    return all(byte & 1 for byte in present)


def test_pages_become_real_when_idle_and_keep_what_is_in_them(backend: CpuAttention) -> None:
    pages = backend.allocate(spec_of(8, 8, 128), 64, 32, torch.bfloat16)  # 4 MiB each
    assert not any(map(resident, pages))
    pages[1][3] = 7.0
    backend.touch_when_idle([pages])
    until = time.monotonic() + 60  # a busy machine has little idle time
    while not all(map(resident, pages)) and time.monotonic() < until:
        time.sleep(0.01)
    assert all(map(resident, pages))
    assert not pages[0].any() and pages[1].count_nonzero() == pages[1][3].numel()


def test_touching_ends_with_its_backend() -> None:
    backend = CpuAttention(torch.device("cpu"))
    before = threads()
    pages = [backend.allocate(spec_of(8, 8, 128), 16384, 32, torch.bfloat16)]  # 1 GiB each
    backend.touch_when_idle(pages)
    assert threads() == before + 1
    del backend
    assert threads() == before and not resident(pages[0][1])


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_one_openmp_runtime_in_the_process(backend: CpuAttention) -> None:
    assert build.openmp_runtime().is_file()  # raises if the library brought a second


def test_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = tmp_path / "small.cpp", tmp_path / "cache"
    source.write_text('extern "C" int f() { return 1; }')
    build.load_library(source, cache)

    def fail(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(build, "_build", fail)
    assert build.load_library(source, cache).f() == 1
    with pytest.raises(AssertionError, match="built again"):
        build.load_library(source, cache, ("-march=native", "-DOTHER"))
    assert len(list(cache.glob("*.so"))) == 1


def test_without_a_compiler_the_reason_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="no g\\+\\+"):
        CpuAttention(torch.device("cpu"), tmp_path)


def test_a_failed_build_quotes_the_compiler_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("int f( {")
    with pytest.raises(build.BuildError, match=r"broken\.cpp:1"):
        build.load_library(source, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so"))
