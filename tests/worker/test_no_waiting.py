"""Submitting a step on an accelerator never waits for it.

The accelerator is torch's "meta" device: it has shapes but no values, so whatever would look at a
value (`item`, `nonzero`, a boolean index, a comparison) fails; copies that block are noticed here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from batching.core.types import SamplingParams, SequencePlan, SlotInit, StepPlan
from batching.worker import (
    device,
    draw_kernel,
    sampler_state,
    sampling,
    torch_worker,
    triton_slots,
)
from batching.worker.attention import AttentionMetadata, LayerSpec
from batching.worker.attention_triton import TritonAttention
from batching.worker.grammar_masks import GrammarSlots
from batching.worker.model import PackedModel
from batching.worker.probe import Probe
from batching.worker.protocol import Capabilities
from batching.worker.sampler_state import SamplerState
from batching.worker.slots import SlotTables
from batching.worker.torch_worker import TorchWorker
from batching.worker.triton_slots import TritonSlots
from tests.worker import tiny_models

META = torch.device("meta")
SEQUENCES, BLOCK = 8, 4
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logit_bias": ((3, 1.5),), "min_tokens": 5, "stop_token_ids": (2,)},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "logprobs": 4},
    {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"temperature": 0.7, "frequency_penalty": 0.5, "allowed_token_ids": (1, 2, 3)},
    {"temperature": 0.0, "logprobs": 0, "prompt_logprobs": 2},
    {"temperature": 0.9, "top_k": 3},
]


class NoBlockingCopies(TorchDispatchMode):
    """Fails at a copy between host and device that the host waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            moved = args[0].device != result.device
            assert not moved or kwargs.get("non_blocking"), f"a blocking copy to {result.device}"
        if func is torch.ops.aten.copy_.default:
            moved = args[0].device != args[1].device
            assert not moved or (len(args) > 2 and args[2]), "a blocking copy"
        return result


class ShapesOnly:
    """An attention backend that computes nothing."""

    def prepare(self, metadata: AttentionMetadata, specs: list[LayerSpec]) -> None:
        return None

    def forward(self, query: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.empty_like(query)


class Kernel:
    """Stands for a Triton kernel, which runs nowhere."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, *args: Any, **constants: Any) -> None:
        assert all(arg.is_meta for arg in args if isinstance(arg, torch.Tensor))


class TritonShapes(TritonAttention):
    """Divides its work, and computes nothing."""

    def __init__(self, specs: list[LayerSpec]) -> None:
        super().__init__(device.choose_device("auto"))
        for spec in specs:
            self.allocate(spec, 1, BLOCK, torch.bfloat16)
        self._device = META

    def forward(self, query: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.empty_like(query)


class Event:
    def __init__(self, device: torch.device) -> None: ...

    def record(self) -> None: ...


def on_the_host(*args: Any, device: object = None, make: Any = torch.tensor, **rest: Any) -> Any:
    """`torch.tensor`, which blocks if it is to make something on the device."""
    assert device is None, "torch.tensor on a device"
    return make(*args, **rest)


def fetch(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """As `device.fetch`, of a device that has nothing to fetch."""
    packed = device.pack(tensors)
    assert packed.is_meta
    return [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in tensors]


MODELS = ["llama", "qwen3", "gemma2", "gpt2", "phi3", "gpt_oss", "qwen3_moe"]
WITH_KERNELS = ["llama", "gemma2"]


@pytest.fixture(
    params=[(name, False) for name in MODELS] + [(name, True) for name in WITH_KERNELS],
    ids=MODELS + [f"{name}, kernels" for name in WITH_KERNELS],
)
def worker(request: Any, monkeypatch: pytest.MonkeyPatch) -> TorchWorker:
    name, with_kernels = request.param
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch_worker, "fetch", fetch)
    monkeypatch.setattr(torch, "tensor", on_the_host)
    model = tiny_models.build(name).to(torch.bfloat16)
    with torch.inference_mode():
        probe = Probe(model, tiny_models.MAX_LEN)
    packed = PackedModel(model.to(META))
    pages = [(torch.empty(0), torch.empty(0))] * len(probe.specs)
    backend: Any = TritonShapes(probe.specs) if with_kernels else ShapesOnly()
    packed.bind(probe.modules, probe.specs, backend, pages)
    limits = Capabilities(
        model="",
        architecture="",
        vocab_size=tiny_models.VOCAB,
        max_model_len=tiny_models.MAX_LEN,
        num_blocks=99,
        block_size=BLOCK,
        max_sequences=SEQUENCES,
        max_step_tokens=64,
        dtype="float32",
        device="meta",
        attention="none",
    )
    worker = TorchWorker.__new__(TorchWorker)
    worker._capabilities, worker._device, worker._model = limits, META, packed
    worker._peers = None
    worker._slots = SlotTables(limits, META)
    if with_kernels:
        worker._slots = TritonSlots(limits, META, backend, probe.specs)
        for kernel in ("write_at", "write_inputs"):
            monkeypatch.setattr(triton_slots, kernel, Kernel())
        for kernel in ("find_bounds", "take_noisiest", "write_winners"):
            monkeypatch.setattr(draw_kernel, kernel, Kernel())
        for module in (sampling, sampler_state):
            monkeypatch.setattr(module, "has_triton", lambda device: True)
    worker._sampler = SamplerState(tiny_models.VOCAB, META, worker._slots.before)
    worker._grammars = GrammarSlots(limits)
    return worker


def test_submitting_never_waits(worker: TorchWorker) -> None:
    prompt = [5, 6, 7, 8, 9]
    inits = [
        SlotInit(slot, f"r{slot}", [*prompt, 3], 5, SamplingParams(max_tokens=9, **kind))
        for slot, kind in enumerate(KINDS)
    ]
    prefill = [SequencePlan(s, 0, 6, s != 2, (2 * s, 2 * s + 1)) for s in range(len(KINDS))]
    mixed = [SequencePlan(s, 6, 1 + s % 2, s % 2 == 0) for s in range(len(KINDS))]
    decode = [SequencePlan(s, 7 + s % 2, 1, True) for s in range(len(KINDS))]
    with NoBlockingCopies():
        for step, shares in enumerate((prefill, mixed, decode)):
            begun = tuple(inits) if step == 0 else ()
            handle = worker.submit(StepPlan(step, begun, tuple(shares)))
            if handle.error is not None:
                raise handle.error
            assert handle.event is not None
            assert handle.tokens is not None
            assert len(handle.tokens) == sum(share.sample for share in shares)


def test_copies_that_block_are_noticed() -> None:
    """The judge is judged."""
    with NoBlockingCopies(), pytest.raises(AssertionError, match="blocking copy"):
        torch.ones(3).to(META)
    with NoBlockingCopies(), pytest.raises(AssertionError, match="blocking copy"):
        torch.empty(3, device=META).copy_(torch.ones(3))


def test_results_are_fetched_in_one_piece() -> None:
    tensors = [
        torch.arange(5),
        torch.rand(3, 2),
        torch.arange(6).view(2, 3).t(),
        torch.tensor([True, False, True]),
        torch.rand(4, dtype=torch.float64),
        torch.empty(0, 3),
    ]
    packed = device.pack(tensors)
    assert packed.dtype == torch.uint8 and packed.ndim == 1
    for got, expected in zip(device.unpack(packed, tensors), tensors, strict=True):
        assert torch.equal(got, expected)
