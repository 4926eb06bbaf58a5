"""Loads a causal language model's weights with transformers, reporting progress."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from batching.worker.device import free_bytes, has_fp8, has_triton, serving_dtype
from batching.worker.model import ATTENTION_NAME
from batching.worker.pool_protocol import PoolConfig
from batching.worker.probe import refuse_by_config
from batching.worker.protocol import UnsupportedModelError, WorkerConfig
from batching.worker.quantized import quantize
from batching.worker.read_ahead import ReadAhead, refuse_beyond

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
PLAIN = (torch.float32, torch.bfloat16, torch.float16)
REPORTS = 50  # progress messages per loading bar, at most


def load_model(
    config: WorkerConfig,
    device: torch.device,
    progress: Progress,
    ahead: ReadAhead | None = None,
) -> Any:
    """A transformers causal LM in eval mode on `device`, its attention set to ours.

    Its weights are those that are read `ahead`, and may still be on their way, where they are what
    the model asks for. Raises `UnsupportedModelError` if the folder cannot be loaded completely, or
    holds an architecture that is refused by its configuration.
    """
    try:
        model_config = AutoConfig.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(f"cannot load {config.model!r}: {error}") from error
    refuse_by_config(model_config, model_config.get_text_config(decoder=True))
    dtype = choose_dtype(config.dtype, model_config, device)
    stored = stored_quantization(config.model, model_config)
    if stored is not None:
        _refuse_with_stored(config, stored)
        if stored == "fp8" and device.type == "cpu":  # as transformers does where there is no GPU
            found = model_config.quantization_config
            found = found if isinstance(found, dict) else found.to_dict()
            model_config.quantization_config = {**found, "dequantize": True}
    model: Any = None if ahead is None else _filled(config.model, model_config, dtype, ahead)
    is_placed = model is not None
    if not is_placed:
        model = _loaded(config, model_config, device, progress, dtype, stored)
    model.eval().requires_grad_(False)
    if stored is not None:
        return model
    if has_triton(device) and config.tensor_parallel == 1 and config.attention != "reference":
        from batching.worker.fused_layers import fuse

        if not fuse(model):
            logger.info("%s: layers are computed by transformers", model.config.model_type)
    if device.type == "cpu":
        return model
    if config.quantization == "fp8" and not has_fp8(device):
        raise UnsupportedModelError("fp8 weights need a GPU of compute capability 8.9 or more")
    if config.quantization != "none":
        quantize(model, config.quantization)
    if not is_placed:
        refuse_too_large(config.model, model, free_bytes(device))
    return model.to(device)


def _filled(folder: str, model_config: Any, dtype: torch.dtype, ahead: ReadAhead) -> Any:
    """A model of Llama's shape with the weights that are read ahead, or None if they do not fit."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(model_config), dtype=dtype, attn_implementation=ATTENTION_NAME
            )
        base = model.base_model
        base.rotary_emb = type(base.rotary_emb)(model.config)  # which has numbers, and no weights
        if Path(folder, "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        if ahead.fill(model, dtype):
            return model
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        logger.info("%r is loaded by transformers: %s", folder, error)
    ahead.cancel()
    return None


def _loaded(
    config: WorkerConfig,
    model_config: Any,
    device: torch.device,
    progress: Progress,
    dtype: torch.dtype,
    stored: str | None,
) -> Any:
    """The model as transformers loads it: on the host, but for ranks' shares and coded weights."""
    divided: dict[str, Any] = {}
    if config.tensor_parallel > 1:
        divided["distributed_config"] = _division(config, model_config)
    elif stored is not None and device.type != "cpu":
        divided["device_map"] = {"": device}  # where their kernels are chosen
    model, absent = load_weights(
        AutoModelForCausalLM,
        config,
        model_config,
        progress,
        dtype=dtype,
        attention=ATTENTION_NAME,
        **divided,
    )
    refuse_incomplete(config.model, absent)
    return model


def stored_quantization(name: str, model_config: Any) -> str | None:
    """How the checkpoint's weights are quantized, if they are.

    Raises `UnsupportedModelError` if transformers does not know; it would take codes for weights.
    """
    found = getattr(model_config, "quantization_config", None)
    if not found:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    method = str(found.get("quant_method"))
    if not (found.get("quant_method") and AutoHfQuantizer.supports_quant_method(found)):
        raise UnsupportedModelError(
            f"{name!r}: its weights are quantized by {method!r}, which transformers cannot load"
        )
    return method


def _refuse_with_stored(config: WorkerConfig, stored: str) -> None:
    reasons = {
        f"no {config.quantization} weights": config.quantization != "none",
        "no tensor_parallel": config.tensor_parallel > 1,
    }
    for refusal, holds in reasons.items():
        if holds:
            raise UnsupportedModelError(
                f"{config.model!r}: {refusal}, because its weights are quantized already ({stored})"
            )


def _division(config: WorkerConfig, model_config: Any) -> Any:
    """How ranks share the weights, as transformers is told it."""
    from transformers.distributed import DistributedConfig

    size, text_config = config.tensor_parallel, model_config.get_text_config(decoder=True)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text_config, name, None) or 0
        if heads % size:
            raise UnsupportedModelError(
                f"{config.model!r}: its {name}, {heads}, do not divide by tensor_parallel {size}"
            )
    return DistributedConfig(tp_size=size)


def load_weights(
    kind: Any,
    config: WorkerConfig | PoolConfig,
    model_config: Any,
    progress: Progress,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    **divided: Any,
) -> tuple[Any, list[str]]:
    """A model made by the auto class `kind`, and the weights that its folder lacks.

    `attention` None is transformers' choice; `divided` tells it where to, and how ranks share the
    weights. Raises `UnsupportedModelError`.
    """
    stored = stored_quantization(config.model, model_config)
    try:
        with _ReportedBars(progress):
            model, info = kind.from_pretrained(
                config.model,
                revision=config.revision,
                config=model_config,
                dtype=dtype,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=None if config.allow_pickle else True,
                attn_implementation=attention,
                output_loading_info=True,
                **divided,
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UnsupportedModelError(f"cannot load {config.model!r}: {error}") from error
    if stored is not None:
        _unify(model, dtype)
    return model, sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))


def _unify(model: Any, dtype: torch.dtype) -> None:
    """Convert what is not quantized (any more) to `dtype`; quantizers leave it as it is stored."""
    kept = {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if all(parameter.dtype in PLAIN for parameter in own.values()):
            for name, parameter in own.items():
                if not kept.intersection([*path.split("."), name]):
                    parameter.data = parameter.data.to(dtype)


def refuse_incomplete(model: str, absent: list[str]) -> None:
    """Raise `UnsupportedModelError` if there are absent weights."""
    if absent:
        raise UnsupportedModelError(
            f"{model!r} lacks {len(absent)} weights of the model, such as {absent[0]}"
        )


def refuse_too_large(name: str, model: Any, free: int) -> None:
    """Raise `UnsupportedModelError` if the model's weights do not fit `free` bytes."""
    tensors = (*model.parameters(), *model.buffers())
    refuse_beyond(name, sum(tensor.nbytes for tensor in tensors), free)


def choose_dtype(requested: str, model_config: Any, device: torch.device) -> torch.dtype:
    """`serving_dtype` of what the checkpoint's config says that it holds."""
    stored = getattr(model_config, "dtype", None)
    stored = stored or getattr(model_config.get_text_config(decoder=True), "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    return serving_dtype(requested, stored, device)


class _ReportedBars:
    """While entered, transformers' loading bars report to `progress` instead of the terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __enter__(self) -> None:
        self._previous = transformers_logging.set_tqdm_hook(
            lambda _factory, args, kwargs: _Bar(self._progress, *args, **kwargs)
        )

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_tqdm_hook(self._previous)


class _Bar:
    """The part of tqdm's interface that transformers uses, as progress reports."""

    def __init__(
        self,
        progress: Progress,
        iterable: Iterable[Any] = (),
        total: float | None = None,
        **_: Any,
    ) -> None:
        self._progress = progress
        self._iterable = iterable
        self._total = total or (len(iterable) if isinstance(iterable, Sized) else 0)
        self._done = self._reported = 0.0

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()

    def update(self, n: float = 1) -> None:
        self._done += n
        if self._total and self._done - self._reported >= self._total / REPORTS:
            self._reported = self._done
            self._progress("weights", min(1.0, self._done / self._total))

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._iterable = ()

    def set_description(self, *_: object, **__: object) -> None: ...

    def set_postfix(self, *_: object, **__: object) -> None: ...

    def refresh(self) -> None: ...
