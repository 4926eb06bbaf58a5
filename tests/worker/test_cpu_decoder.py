"""The C++ decoder: which models it takes, its promise about bits, and int8 weights.

That float32 tokens equal transformers' is proven by test_architectures.py on the wide models.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from batching.worker import llama_shape
from batching.worker.cpu import decoder
from batching.worker.cpu import linear as packing
from batching.worker.cpu.attention import SOURCE
from batching.worker.cpu.build import load_library
from batching.worker.cpu.linear import PANEL, PackedLinear, halve, pack, quantize
from batching.worker.protocol import WorkerConfig
from batching.worker.torch_worker import TorchWorker
from tests.worker import tiny_models
from tests.worker.builds import EMULATED_AMX, OTHERS, lesser
from tests.worker.harness import Harness, Outcome, request

WIDE = [name for name in tiny_models.ARCHITECTURES if name.endswith("_wide")]
LENGTHS = (3, 20, 45, 70)
WIDTH = tiny_models.WIDE["hidden_size"]


def refusal(name: str, **overrides: Any) -> str | None:
    model = tiny_models.build(name, **overrides)
    return llama_shape.refuses(model) or decoder.refuses(llama_shape.shape(model))


@pytest.mark.parametrize("name", WIDE)
def test_takes_the_architectures_it_names(name: str) -> None:
    assert refusal(name) is None


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("gemma2", {}, "Gemma2DecoderLayer"),
        ("granite", {}, "GraniteDecoderLayer"),
        ("gpt2", {}, "not in a list"),
        ("llama_wide", {"hidden_act": "gelu"}, "activation is gelu"),
        ("llama_wide", {"mlp_bias": True}, "biases"),
        ("llama_wide", {"head_dim": 16}, "rotary width, 16"),
        ("llama_wide", {"head_dim": 544}, "head size, 544, is above 512"),
        ("llama_wide", {"intermediate_size": 40}, "intermediate size, 40"),
    ],
)
def test_refuses_what_it_does_not_compute(
    name: str, overrides: dict[str, Any], reason: str
) -> None:
    assert reason in (refusal(name, **overrides) or "")


def worker_of(folder: Path, **settings: Any) -> TorchWorker:
    config = {"device": "cpu", "max_sequences": 8, "max_step_tokens": 512, "num_blocks": 64}
    return TorchWorker(WorkerConfig(model=str(folder), **{**config, **settings}))


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in LENGTHS]


def serve(worker: TorchWorker, asked: list[list[int]], **limits: Any) -> list[Outcome]:
    requests = [
        request(f"r{i}", prompt, max_tokens=12, logprobs=5) for i, prompt in enumerate(asked)
    ]
    return list(Harness(worker, **limits).run(requests).values())


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("how", [{"dtype": "float32"}, {"dtype": "bfloat16"},
                                 {"dtype": "bfloat16", "quantization": "int8"}])  # fmt: skip
def test_logprobs_keep_their_bits_in_every_batch_mix(
    name: str, how: dict[str, str], tmp_path: Path
) -> None:
    folder = tiny_models.save(name, tmp_path)
    worker = worker_of(folder, threads=2, **how)
    alone = [serve(worker, [prompt], prefix_caching=False)[0] for prompt in prompts()]
    for limits in (
        {"prefix_caching": False},
        {"prefix_caching": False, "max_step_tokens": 17},
        {"prefix_caching": True},
        {"prefix_caching": True},
    ):
        assert serve(worker, prompts(), **limits) == [
            # Only what was found in the cache may differ.
            Outcome(o.tokens, o.logprobs, cached_tokens=crowd.cached_tokens, finish=o.finish)
            for o, crowd in zip(alone, serve(worker, prompts(), **limits), strict=True)
        ]
    single = worker_of(folder, threads=1, **how)
    assert serve(single, prompts()[:1]) == alone[:1]


@pytest.mark.parametrize("how", [{"dtype": "float32"}, {"dtype": "bfloat16"},
                                 {"dtype": "bfloat16", "quantization": "int8"}])  # fmt: skip
def test_steps_of_several_blocks(how: dict[str, str], tmp_path: Path) -> None:
    """And an operand whose last piece is half a cache line."""
    longer = {"intermediate_size": 48, "max_position_embeddings": 1024, "rope_parameters": None}
    folder = tiny_models.save("llama_wide", tmp_path, **longer)
    generator = torch.Generator().manual_seed(11)
    asked = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (300, 270, 5)]
    worker = worker_of(folder, threads=2, max_step_tokens=1024, **how)
    alone = {"prefix_caching": False, "max_step_tokens": 50}
    together = serve(worker, asked, prefix_caching=False)
    assert together == [serve(worker, [prompt], **alone)[0] for prompt in asked]
    if how["dtype"] == "float32":
        model = tiny_models.build("llama_wide", **longer)
        for prompt, outcome in zip(asked, together, strict=True):
            whole = model.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
            )
            assert outcome.tokens == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "how", [{"dtype": "float32"}, {"dtype": "bfloat16", "quantization": "int8"}]
)
def test_threads_that_lose_their_cores_change_nothing(how: dict[str, str], tmp_path: Path) -> None:
    """More threads than cores: late ones find phases over, waiting ones give up their cores."""
    folder, before = tiny_models.save("llama_wide", tmp_path), torch.get_num_threads()
    cores = os.sched_getaffinity(0)
    try:
        expected = serve(worker_of(folder, threads=1, **how), prompts(), prefix_caching=False)
        crowd = worker_of(folder, threads=2 * len(cores) + 1, **how)
        for _ in range(3):
            assert serve(crowd, prompts(), prefix_caching=False) == expected
    finally:
        torch.set_num_threads(before)
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            assert os.sched_getaffinity(int(thread.name)) == cores


@pytest.mark.parametrize("how", [{"dtype": "float32"}, {"dtype": "bfloat16"},
                                 {"dtype": "bfloat16", "quantization": "int8"}])  # fmt: skip
def test_the_largest_is_the_logits_first_largest(how: dict[str, str], tmp_path: Path) -> None:
    folder = tiny_models.save("llama_wide", tmp_path, vocab_size=40)  # padded to 64 columns
    model = worker_of(folder, threads=2, **how)._model
    assert isinstance(model, decoder.CpuDecoder)
    generator = torch.Generator().manual_seed(5)
    weights = model.logits(torch.eye(WIDTH, dtype=model._dtype)).T.clone()
    # Below the zeros of the padding.
    negative = torch.linalg.pinv(weights) @ torch.rand(40, 3, generator=generator).sub(2)
    assert (model.logits(negative.T.to(model._dtype)) < 0).all()
    for rows in (negative.T, *(torch.randn(n, WIDTH, generator=generator) for n in (1, 40, 70))):
        hidden = rows.to(model._dtype)
        logits = model.logits(hidden)
        assert torch.equal(model.largest(hidden), logits.argmax(dim=-1))
    for _ in range(200):  # all are equal, whichever thread comes first
        assert not model.largest(torch.zeros(5, WIDTH, dtype=model._dtype)).any()


def test_int8_weights_stay_near_the_model(tmp_path: Path) -> None:
    folder = tiny_models.save("llama_wide", tmp_path)
    exact = serve(worker_of(folder, dtype="float32"), prompts())
    worker = worker_of(folder, dtype="float32", quantization="int8")
    capabilities = worker.capabilities()
    close = serve(worker, prompts())
    for one, other in zip(exact, close, strict=True):
        first, second = one.logprobs[0], other.logprobs[0]
        assert first.token in [token for token, _ in second.top]
        assert dict(second.top)[first.token] == pytest.approx(first.logprob, abs=0.3)
    full = worker_of(folder, dtype="float32").capabilities()
    assert capabilities.weight_bytes < 0.6 * full.weight_bytes


def test_packed_panels_hold_the_weights() -> None:
    weight = torch.randn(2 * PANEL, 48).bfloat16()
    panels = pack(weight)
    assert panels.shape == (2, 2, 2, 16, 16, 2)
    assert torch.equal(panels[1, 0, 1, 3, 5], weight[PANEL + 16 + 5, 6:8])
    assert not panels[:, 1, :, 8:].any()  # 24 units of weights, 8 of padding
    assert PackedLinear(weight[:40]).columns == 2 * PANEL


def test_quantized_weights_err_by_at_most_half_a_step() -> None:
    weight = torch.randn(8, 64)
    weight[3] = 0
    integers, scales = quantize(weight)
    assert ((integers * scales[:, None] - weight).abs() <= scales[:, None] * 0.501).all()
    assert integers[3].eq(0).all()


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_bfloat16_holds_are_kept_so_and_change_no_bit(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.build("qwen2_wide", tie_word_embeddings=tied)
    model.bfloat16().float().save_pretrained(tmp_path)
    halved = worker_of(tmp_path, dtype="float32")
    monkeypatch.setattr(packing, "halve", torch.Tensor.float)
    whole = worker_of(tmp_path, dtype="float32")
    assert serve(halved, prompts()) == serve(whole, prompts())
    embedding = 0 if tied else model.get_input_embeddings().weight.nbytes
    less, full = (w.capabilities().weight_bytes - embedding for w in (halved, whole))
    assert less < 0.6 * full


def test_only_weights_that_bfloat16_holds_are_halved() -> None:
    weight = torch.randn(40, 64)
    held = weight.bfloat16().float()
    for same in (held, held.bfloat16()):
        assert halve(same).dtype == torch.bfloat16
        assert torch.equal(halve(same).float(), held)
    assert halve(weight) is weight
    held[39, 63] += 1e-3
    assert halve(held) is held
    assert halve(held.half()).dtype == torch.float32


def project(library: ctypes.CDLL, packed: PackedLinear, given: torch.Tensor) -> torch.Tensor:
    output = torch.empty(len(given), packed.columns)
    library.slipstream_project(
        ctypes.byref(packed.struct),
        ctypes.c_void_p(given.data_ptr()),
        len(given),
        ctypes.c_void_p(output.data_ptr()),
        1,
        given.dtype == torch.bfloat16,
    )
    return output


@pytest.mark.parametrize("target", OTHERS)
@pytest.mark.parametrize("inputs", [48, 640])
def test_products_on_other_instruction_sets(
    target: str, inputs: int, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    library = load_library(SOURCE, *lesser(target, tmp_path_factory))
    torch.manual_seed(1)
    weight, given = torch.randn(96, inputs), torch.randn(300, inputs)
    short_weight, short_given = weight.bfloat16(), given.bfloat16()
    halved = PackedLinear(short_weight.float())
    assert halved.panels.dtype == torch.bfloat16
    cases = [
        (PackedLinear(weight), given, weight, 1e-4),
        (halved, given, short_weight, 1e-4),
        (PackedLinear(short_weight), short_given, short_weight, 1e-3),
        (PackedLinear(weight, int8=True), given, weight, 0.3 + inputs / 640),  # six deviations
    ]
    for packed, rows, exact, tolerance in cases:
        every = project(library, packed, rows)
        expected = rows.double() @ exact.double().T
        assert (every - expected).abs().max() < tolerance
        for count in (1, 2, 3, 5, 7, 13, 40):
            assert torch.equal(project(library, packed, rows[:count].contiguous()), every[:count])
    monkeypatch.setattr(packing, "halve", torch.Tensor.float)
    whole = PackedLinear(short_weight.float())
    assert whole.panels.dtype == torch.float32
    assert torch.equal(project(library, whole, given), project(library, halved, given))


def test_tile_instructions_are_used_right(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With the tile instructions spelled out in C++, since few machines have them."""
    cache = tmp_path_factory.getbasetemp() / "emulated"
    emulated = load_library(SOURCE, cache, EMULATED_AMX)
    assert emulated.slipstream_self_check() == 0
    torch.manual_seed(0)
    for int8 in (False, True):
        weight = torch.randn(96, 128).bfloat16()
        packed = PackedLinear(weight, int8=int8)
        for rows in (1, 2, 15, 16, 17, 31, 32, 33, 70, 200):
            given = torch.randn(rows, 128).bfloat16()
            output = project(emulated, packed, given)
            exact = given.float() @ weight.float().T
            assert (output - exact).abs().max() < (0.7 if int8 else 1e-3)  # six deviations
