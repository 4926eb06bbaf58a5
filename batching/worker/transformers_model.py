"""Any decoder-only model, loaded by transformers, and the fastest runner for it."""

from __future__ import annotations

import logging
from typing import Any

import torch

from batching.worker import llama_shape
from batching.worker.attention import AttentionBackend
from batching.worker.device import has_triton, peak_bytes
from batching.worker.load import load_model
from batching.worker.logprobs import PROMPT_LOGPROB_ROWS, token_logprobs
from batching.worker.model import PackedModel
from batching.worker.probe import Probe, freeze_rope, rope_limit
from batching.worker.protocol import WorkerConfig
from batching.worker.quantized import quantize
from batching.worker.read_ahead import ReadAhead
from batching.worker.runner import Pages, Runner
from batching.worker.sampling import Draws, SamplingInputs, sample
from batching.worker.start_up import Phases, choose_max_model_len, end_tokens

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 64  # more than products of few rows have


class TransformersModel:
    """Implements `runner.Loaded`. Raises `UnsupportedModelError` if it cannot be served exactly."""

    def __init__(
        self,
        config: WorkerConfig,
        device: torch.device,
        phases: Phases,
        ahead: ReadAhead | None = None,
    ) -> None:
        """With weights that are read `ahead`, it computes rubbish until they have been."""
        self._config = config
        model = self._model = load_model(config, device, phases.report, ahead)
        text_config = model.config.get_text_config(decoder=True)
        self.architecture = type(model).__name__
        self.vocab_size = text_config.vocab_size
        self.dtype = model.dtype
        self.max_model_len = choose_max_model_len(
            config.max_model_len, text_config, rope_limit(model)
        )
        self.end_tokens = end_tokens(model.generation_config, model.config, text_config)
        freeze_rope(model)
        self._packed = PackedModel(model)
        phases.begin("kernels")
        with torch.inference_mode():
            if device.type == "cpu":
                self._probe, self.step_bytes = Probe(model, self.max_model_len), 0
            else:
                if has_triton(device):
                    self._compile()
                self._probe, self.step_bytes = peak_bytes(
                    device, lambda: largest_step(model, self._packed, self.max_model_len, config)
                )
        self.specs = self._probe.specs

    def _compile(self) -> None:
        """Have the kernels ready that the largest step launches."""
        from batching.worker.compiling import compile_together

        def rehearse() -> None:
            Probe(self._model, self.max_model_len, PROMPT_TOKENS)
            largest_draw(self._model, self._packed, self._config)

        compile_together(rehearse)

    def bind(self, backend: AttentionBackend, pages: Pages) -> Runner:
        """On CPU a runner in C++ where there is one, else the transformers model itself."""
        model, config = self._model, self._config
        if backend.name == "cpu" and config.tensor_parallel == 1:
            from batching.worker.cpu import decoder
            from batching.worker.cpu.attention import CpuAttention

            assert isinstance(backend, CpuAttention)
            refusal = llama_shape.refuses(model) or decoder.refuses(llama_shape.shape(model))
            if config.quantization not in decoder.QUANTIZATIONS:
                refusal = f"it has no {config.quantization} weights"
            if refusal is None:
                weights = llama_shape.weights(model, self.max_model_len)
                int8 = config.quantization == "int8"
                runner = decoder.CpuDecoder(
                    weights, self.specs, backend, pages, model.dtype, int8=int8
                )
                llama_shape.empty(model)
                return runner
            logger.info("the C++ decoder is not used: %s", refusal)
        if model.device.type == "cpu" and config.quantization != "none":
            quantize(model, config.quantization)
        self._packed.bind(self._probe.modules, self.specs, backend, pages)
        return self._packed


def largest_step(
    model: Any, packed: PackedModel, max_model_len: int, config: WorkerConfig
) -> Probe:
    """The probe, at what takes the most memory in a step.

    Attention is not in it: its backend reserves what it needs.
    """
    probe = Probe(model, max_model_len, config.max_step_tokens)
    _logits, raw, tokens = largest_draw(model, packed, config)
    token_logprobs(raw, tokens, 1)
    return probe


def largest_draw(
    model: Any, packed: PackedModel, config: WorkerConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As many rows of logits as a step may want; a copy; and what is drawn at the most cost."""
    rows = max(config.max_sequences, PROMPT_LOGPROB_ROWS)
    width = model.get_input_embeddings().weight.shape[1]
    logits = packed.logits(torch.zeros(rows, width, dtype=model.dtype, device=model.device))
    half = torch.full((rows,), 0.5, device=model.device)
    every = torch.arange(rows, device=model.device)
    keys = torch.zeros(rows, 2, dtype=torch.int32, device=model.device)
    draws = Draws(every, temperature=half, keys=keys, top_p=half, min_p=half)
    return logits, logits[every], sample(logits, SamplingInputs(draws=(draws,)))
