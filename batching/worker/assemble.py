"""Start-up: from a configuration to a model bound to its KV pages, with the time of each phase."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batching.worker.attention import KV_DTYPES, AttentionBackend, LayerSpec, choose_backend
from batching.worker.device import choose_device, free_bytes
from batching.worker.kv_pool import block_bytes, choose_num_blocks
from batching.worker.peers import Peers
from batching.worker.protocol import Capabilities, UnsupportedModelError, WorkerConfig
from batching.worker.read_ahead import read_ahead
from batching.worker.runner import Loaded, Pages, Runner
from batching.worker.slots import SlotTables
from batching.worker.start_up import Phases

GRAPHED = ("cuda",)  # kinds of devices that record launches
HOSTS = ("cpu",)  # those whose memory is the host's: weights are copied nowhere


@dataclass
class Assembled:
    """A model ready to run steps."""

    model: Runner
    backend: AttentionBackend
    pages: Pages
    device: torch.device
    capabilities: Capabilities
    slots: SlotTables


def assemble(config: WorkerConfig, phases: Phases, peers: Peers | None = None) -> Assembled:
    """Load, check and bind a model. Raises `UnsupportedModelError` if it cannot be served."""
    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model, backend = _load(config, device, phases)
    phases.begin("kv")
    specs, max_model_len, size = model.specs, model.max_model_len, config.block_size
    backend.reserve(specs, config.max_sequences, max_model_len + 1)
    each = block_bytes(backend, specs, size, model.dtype)
    is_cpu = device.type == "cpu"
    graphed = device.type in GRAPHED and backend.name == "triton"
    step = model.step_bytes * (1 + graphed)  # recordings keep their own, which is less
    blocks = choose_num_blocks(config, max_model_len, each, free_bytes(device), step, is_cpu=is_cpu)
    if peers is not None:
        blocks = peers.least(blocks)
    try:
        pages = [backend.allocate(s, blocks + graphed, size, model.dtype) for s in specs]
    except ValueError as error:
        raise UnsupportedModelError(f"block_size {size}: {error}") from error
    phases.begin("pack")
    runner = model.bind(backend, pages)
    capabilities = Capabilities(
        model=config.model,
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        num_blocks=blocks,
        block_size=size,
        max_sequences=config.max_sequences,
        max_step_tokens=config.max_step_tokens,
        dtype=str(model.dtype).removeprefix("torch."),
        kv_dtype=str(pages[0][0].dtype).removeprefix("torch."),
        device=str(device),
        attention=backend.name,
        eos_token_ids=model.end_tokens,
        overlap=0 if is_cpu else 1,
        weight_bytes=runner.weight_bytes,
        kv_bytes=blocks * each,
        phases=phases.seconds,
    )
    slots = _slots(device, backend, specs, capabilities)
    if graphed:
        phases.begin("graphs")
        runner = _record(runner, specs, backend, capabilities, slots)
    return Assembled(runner, backend, pages, device, capabilities, slots)


def _load(
    config: WorkerConfig, device: torch.device, phases: Phases
) -> tuple[Loaded, AttentionBackend]:
    """The model, and the attention for it."""
    phases.begin("weights")
    backend, stored = None, KV_DTYPES[config.kv_cache_dtype]
    if device.type == "cpu":
        from batching.worker.cpu.checkpoint import open_checkpoint

        plain = open_checkpoint(config, phases.report)
        if plain is not None:
            phases.begin("kernels")
            backend = choose_backend(config.attention, device, plain.specs, plain.dtype, stored)
            if backend.name == "cpu":
                return plain, backend
            phases.begin("weights")
    ahead = None if device.type in HOSTS else read_ahead(config, device)
    # Here, because importing it takes longer than the rest of a small model's start.
    from batching.worker.transformers_model import TransformersModel

    model = TransformersModel(config, device, phases, ahead)
    if ahead is not None:
        phases.begin("weights")
        ahead.finish(phases.report)
    if backend is None:
        backend = choose_backend(config.attention, device, model.specs, model.dtype, stored)
    return model, backend


def _slots(
    device: torch.device,
    backend: AttentionBackend,
    specs: list[LayerSpec],
    limits: Capabilities,
) -> SlotTables:
    if backend.name != "triton":
        return SlotTables(limits, device)
    from batching.worker.attention_triton import TritonAttention
    from batching.worker.triton_slots import TritonSlots

    assert isinstance(backend, TritonAttention)
    return TritonSlots(limits, device, backend, specs)


def _record(
    model: Runner,
    specs: list[LayerSpec],
    backend: AttentionBackend,
    limits: Capabilities,
    slots: SlotTables,
) -> Runner:
    """The model with its small steps recorded."""
    from batching.worker.attention_triton import TritonAttention
    from batching.worker.compiling import compile_together
    from batching.worker.cuda_graphs import GraphedModel, Recorder
    from batching.worker.model import PackedModel
    from batching.worker.triton_slots import TritonSlots

    assert isinstance(model, PackedModel)
    assert isinstance(backend, TritonAttention)
    assert isinstance(slots, TritonSlots)
    graphed = GraphedModel(model, backend, specs, limits, slots.tables)
    with torch.inference_mode():
        compile_together(lambda: graphed.record(lambda run: (lambda: None, run())))
        graphed.record(Recorder())
    slots.place = graphed.place
    return graphed
