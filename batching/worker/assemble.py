"""Start-up: from a configuration to a model bound to its KV pages, with the time of each phase."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from batching.worker.attention import KV_DTYPES, AttentionBackend, LayerSpec, choose_backend
from batching.worker.device import choose_device, free_bytes, peak_bytes
from batching.worker.kv_pool import block_bytes, choose_num_blocks
from batching.worker.load import load_model
from batching.worker.logprobs import PROMPT_LOGPROB_ROWS, token_logprobs
from batching.worker.model import PackedModel, Runner
from batching.worker.peers import Peers
from batching.worker.probe import Probe, freeze_rope, rope_limit
from batching.worker.protocol import Capabilities, UnsupportedModelError, WorkerConfig
from batching.worker.quantized import quantize
from batching.worker.sampling import Draws, SamplingInputs, sample

logger = logging.getLogger(__name__)


GRAPHED = ("cuda",)  # kinds of devices that record launches


class Phases:
    """Reports start-up phases as they begin, and keeps the seconds that each took."""

    def __init__(self, progress: Callable[[str, float], None]) -> None:
        self.report = progress
        self.seconds: dict[str, float] = {}
        self._name = ""
        self._start = 0.0

    def begin(self, name: str) -> None:
        """End the phase that runs, and begin one of this name."""
        self.end()
        self._name, self._start = name, time.perf_counter()
        self.report(name, 0.0)

    def end(self) -> None:
        """End the phase that runs, if any."""
        if self._name:
            self.seconds[self._name] = time.perf_counter() - self._start
        self._name = ""


@dataclass
class Assembled:
    """A model ready to run steps."""

    model: Runner
    backend: AttentionBackend
    pages: list[tuple[torch.Tensor, torch.Tensor]]
    device: torch.device
    capabilities: Capabilities
    spare: int  # a block that no sequence is given


def assemble(config: WorkerConfig, phases: Phases, peers: Peers | None = None) -> Assembled:
    """Load, check and bind a model. Raises `UnsupportedModelError` if it cannot be served."""
    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    phases.begin("weights")
    model = load_model(config, device, phases.report)
    text_config = model.config.get_text_config(decoder=True)
    max_model_len = choose_max_model_len(config.max_model_len, text_config, rope_limit(model))
    freeze_rope(model)
    packed = PackedModel(model)
    phases.begin("kernels")
    is_cpu = device.type == "cpu"
    with torch.inference_mode():
        if is_cpu:
            probe, step = Probe(model, max_model_len), 0
        else:
            probe, step = peak_bytes(
                device, lambda: largest_step(model, packed, max_model_len, config)
            )
    stored = KV_DTYPES[config.kv_cache_dtype]
    backend = choose_backend(config.attention, device, probe.specs, model.dtype, stored)
    phases.begin("kv")
    backend.reserve(probe.specs, config.max_sequences, max_model_len + 1)
    each = block_bytes(backend, probe.specs, config.block_size, model.dtype)
    graphed = device.type in GRAPHED and backend.name == "triton"
    step *= 1 + graphed  # recordings keep their own, which is less
    blocks = choose_num_blocks(config, max_model_len, each, free_bytes(device), step, is_cpu=is_cpu)
    if peers is not None:
        blocks = peers.least(blocks)
    size = config.block_size
    try:
        pages = [backend.allocate(s, blocks + graphed, size, model.dtype) for s in probe.specs]
    except ValueError as error:
        raise UnsupportedModelError(f"block_size {config.block_size}: {error}") from error
    phases.begin("pack")
    runner = _bind(model, packed, probe, backend, pages, max_model_len, config)
    capabilities = Capabilities(
        model=config.model,
        architecture=type(model).__name__,
        vocab_size=text_config.vocab_size,
        max_model_len=max_model_len,
        num_blocks=blocks,
        block_size=config.block_size,
        max_sequences=config.max_sequences,
        max_step_tokens=config.max_step_tokens,
        dtype=str(model.dtype).removeprefix("torch."),
        kv_dtype=str(pages[0][0].dtype).removeprefix("torch."),
        device=str(device),
        attention=backend.name,
        eos_token_ids=end_tokens(model),
        overlap=0 if is_cpu else 1,
        weight_bytes=runner.weight_bytes,
        kv_bytes=blocks * each,
        phases=phases.seconds,
    )
    if graphed:
        phases.begin("graphs")
        runner = _record(packed, probe.specs, backend, capabilities)
    return Assembled(runner, backend, pages, device, capabilities, blocks if graphed else 0)


def _bind(
    model: Any,
    packed: PackedModel,
    probe: Probe,
    backend: AttentionBackend,
    pages: list[tuple[torch.Tensor, torch.Tensor]],
    max_model_len: int,
    config: WorkerConfig,
) -> Runner:
    """The fastest runner that computes the model exactly: on CPU a C++ one where there is one."""
    if backend.name == "cpu" and config.tensor_parallel == 1:
        from batching.worker.cpu import decoder
        from batching.worker.cpu.attention import CpuAttention

        assert isinstance(backend, CpuAttention)
        refusal = decoder.refuses(model)
        if config.quantization not in decoder.QUANTIZATIONS:
            refusal = f"it has no {config.quantization} weights"
        if refusal is None:
            return decoder.CpuDecoder(
                model,
                probe.specs,
                backend,
                pages,
                max_model_len,
                int8=config.quantization == "int8",
            )
        logger.info("the C++ decoder is not used: %s", refusal)
    if model.device.type == "cpu" and config.quantization != "none":
        quantize(model, config.quantization)
    packed.bind(probe.modules, probe.specs, backend, pages)
    return packed


def _record(
    packed: PackedModel,
    specs: list[LayerSpec],
    backend: AttentionBackend,
    capabilities: Capabilities,
) -> Runner:
    """The model with its small steps recorded. The block after the last is the dummies'."""
    from batching.worker.attention_triton import TritonAttention
    from batching.worker.cuda_graphs import GraphedModel, Recorder

    assert isinstance(backend, TritonAttention)
    graphed = GraphedModel(packed, backend, specs, capabilities, capabilities.num_blocks)
    with torch.inference_mode():
        graphed.record(Recorder())
    return graphed


def largest_step(
    model: Any, packed: PackedModel, max_model_len: int, config: WorkerConfig
) -> Probe:
    """The probe, at what takes the most memory in a step.

    Attention is not in it: its backend reserves what it needs.
    """
    probe = Probe(model, max_model_len, config.max_step_tokens)
    rows = max(config.max_sequences, PROMPT_LOGPROB_ROWS)
    width = model.get_input_embeddings().weight.shape[1]
    logits = packed.logits(torch.zeros(rows, width, dtype=model.dtype, device=model.device))
    half = torch.full((rows,), 0.5, device=model.device)
    every = torch.arange(rows, device=model.device)
    keys = torch.zeros(rows, 2, dtype=torch.int32, device=model.device)
    draws = Draws(every, temperature=half, keys=keys, top_p=half, min_p=half)
    token_logprobs(logits[every], sample(logits, SamplingInputs(draws=(draws,))), 1)
    return probe


def choose_max_model_len(requested: int | None, text_config: Any, rope: int | None) -> int:
    """The longest sequence served: what was asked for, or the most that the model computes exactly.

    Raises `UnsupportedModelError` if more was asked for.
    """
    limits = {"its maximum position": getattr(text_config, "max_position_embeddings", None)}
    limits["what it computes before its rotary frequencies change"] = rope
    known = {reason: limit for reason, limit in limits.items() if limit is not None}
    kind = text_config.model_type
    if not known:
        if requested is None:
            raise UnsupportedModelError(f"{kind}: no maximum length known; set max_model_len")
        return requested
    reason, limit = min(known.items(), key=lambda item: item[1])
    if requested is not None and requested > limit:
        raise UnsupportedModelError(f"{kind}: max_model_len {requested} exceeds {reason}, {limit}")
    return requested or limit


def end_tokens(model: Any) -> tuple[int, ...]:
    """The token ids that end a text: those of the generation config, else of the model's config."""
    for config in (
        model.generation_config,
        model.config,
        model.config.get_text_config(decoder=True),
    ):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
    return ()
