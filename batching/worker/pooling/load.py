"""Start-up of a pooling model: load it, choose how batches run, and prove that they run right."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from batching.core.types import PoolRequest
from batching.worker.cpu.packed_module import CpuLinear, swap_linears
from batching.worker.device import choose_device
from batching.worker.load import choose_dtype, load_weights, refuse_incomplete
from batching.worker.pool_protocol import PoolCapabilities, PoolConfig
from batching.worker.pooling.heads import ClassifierHead, Head, PoolingHead
from batching.worker.pooling.packed import ATTENTION_NAME, CannotPackError, PackedRunner
from batching.worker.pooling.padded import PaddedRunner
from batching.worker.pooling.recipe import Recipe, read_recipe
from batching.worker.probe import freeze_rope, rope_limit
from batching.worker.protocol import UnsupportedModelError
from batching.worker.start_up import Phases, choose_max_model_len

logger = logging.getLogger(__name__)

_PROOF_LENGTHS = (7, 1, 12)
_TOLERANCE = {torch.float32: 1e-4}  # of the largest number; other types round more
_COARSE_TOLERANCE = 0.1


class Runner(Protocol):
    """Runs a base model on a batch of texts."""

    name: str

    def hidden(self, batch: Sequence[PoolRequest]) -> list[torch.Tensor]: ...


class Assembled(NamedTuple):
    """A pooling model ready to run batches."""

    runner: Runner
    head: Head
    capabilities: PoolCapabilities


def assemble(config: PoolConfig, phases: Phases) -> Assembled:
    """Load and check a model. Raises `UnsupportedModelError` if it cannot be served."""
    if config.quantization != "none":
        raise UnsupportedModelError(f"pooling models have no {config.quantization} weights")
    device = choose_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    phases.begin("weights")
    recipe = read_recipe(Path(config.model))
    model, dtype = _load(config, device, phases.report)
    is_classifier = _is_classifier(model.config)
    if recipe is None:
        recipe = Recipe(("lasttoken" if _is_decoder(model) else "mean",))
    max_model_len, first_position = _limits(model, recipe, config.max_model_len)
    freeze_rope(model)
    head: Head = ClassifierHead(model) if is_classifier else PoolingHead(recipe, device)
    phases.begin("prove")
    with torch.inference_mode():
        runner, weight_bytes = _choose_runner(model, head, dtype, max_model_len, first_position)
        size = len(head(*_states(runner, _proof_batch(model)[:1])[0]))
    capabilities = PoolCapabilities(
        model=config.model,
        architecture=type(model).__name__,
        task="classify" if is_classifier else "embed",
        size=size,
        vocab_size=model.get_input_embeddings().weight.shape[0],
        max_model_len=max_model_len,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        pooling="head" if is_classifier else "+".join(recipe.modes),
        runner=runner.name,
        labels=_labels(model.config, size) if is_classifier else (),
        activation=_activation(model.config, size) if is_classifier else "identity",
        lower_case=recipe.lower_case,
        weight_bytes=weight_bytes,
        phases=phases.seconds,
    )
    return Assembled(runner, head, capabilities)


def _is_classifier(config: Any) -> bool:
    return (config.architectures or [""])[0].endswith("ForSequenceClassification")


def _is_decoder(model: Any) -> bool:
    """Whether tokens see only those before them. `is_causal` is what its attention goes by."""
    return any(getattr(module, "is_causal", False) is True for module in model.base_model.modules())


def _load(
    config: PoolConfig, device: torch.device, progress: Callable[[str, float], None]
) -> tuple[Any, torch.dtype]:
    """The transformers model, and the type of its products.

    On the CPU the default is float32, since what one stores is compared for years; there the
    weights are loaded as float32 for bfloat16 too, and only the products are in bfloat16.
    """
    try:
        model_config = AutoConfig.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(f"cannot load {config.model!r}: {error}") from error
    if getattr(model_config, "is_encoder_decoder", False):
        kind = model_config.model_type
        raise UnsupportedModelError(f"{kind}: encoder-decoder models are not supported")
    is_cpu = device.type == "cpu"
    wanted = "float32" if is_cpu and config.dtype == "auto" else config.dtype
    dtype = choose_dtype(wanted, model_config, device)
    loaded = torch.float32 if is_cpu and dtype == torch.bfloat16 else dtype
    kind = AutoModelForSequenceClassification if _is_classifier(model_config) else AutoModel
    model, absent = load_weights(kind, config, model_config, progress, dtype=loaded)
    if not _is_classifier(model_config):  # a pooler that nothing asks
        absent = [key for key in absent if not key.startswith("pooler.")]
    refuse_incomplete(config.model, absent)
    return model.to(device).eval().requires_grad_(False), dtype


def _limits(model: Any, recipe: Recipe, requested: int | None) -> tuple[int, int]:
    """The longest text served, and the position of its first token.

    RoBERTa and its kin count positions from behind the padding token's; their table of positions
    has a padding entry.
    """
    text_config = model.config.get_text_config()
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    first = 0 if padding is None else padding + 1
    rows = getattr(table, "num_embeddings", None)
    limit = choose_max_model_len(None, text_config, rope_limit(model))
    limit = limit if rows is None else min(limit, rows - first)
    if requested is not None and requested > limit:
        kind = text_config.model_type
        raise UnsupportedModelError(f"{kind}: max_model_len {requested} exceeds {limit}")
    return requested or min(limit, recipe.max_seq_length or limit), first


def _choose_runner(
    model: Any, head: Head, dtype: torch.dtype, max_model_len: int, first: int
) -> tuple[Runner, int]:
    """The packed runner if it computes what the model itself does, else the padded one.

    Also the bytes of all weights. On the CPU linear layers are replaced by ours.
    """
    has_types = (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    padded = PaddedRunner(model.base_model, first, has_types=has_types)
    batch = [r for r in _proof_batch(model) if len(r.tokens) <= max_model_len]
    expected = [head(*pair) for one in batch for pair in _states(padded, [one])]
    runner: Runner = padded
    own_attention = model.config._attn_implementation
    try:
        if model.device.type != "cpu":  # there, attention text by text would cost a launch each
            raise CannotPackError("the device is no CPU")
        packed = PackedRunner(model.base_model, first, has_types=has_types)
        model.set_attn_implementation(ATTENTION_NAME)
        _prove(packed, head, batch, expected, torch.float32)
        if packed.window is not None and packed.window < max_model_len:
            raise CannotPackError(f"a sliding window of {packed.window} tokens")
        runner = packed
    except (CannotPackError, TypeError, ValueError, RuntimeError) as error:
        logger.info("texts are padded, not packed: %s", error)
        model.set_attn_implementation(own_attention)
    if model.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        _swap(model, dtype)
        _prove(runner, head, batch, expected, dtype)
    return runner, _weight_bytes(model)


def _swap(model: Any, dtype: torch.dtype) -> None:
    from batching.worker.cpu.attention import SOURCE
    from batching.worker.cpu.build import load_library

    try:
        library = load_library(SOURCE)
    except OSError as error:
        logger.warning("the C++ products are not used: %s", error)
        model.to(dtype)
        return
    swap_linears(model.base_model, library, dtype)


def _prove(
    runner: Runner,
    head: Head,
    batch: Sequence[PoolRequest],
    expected: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Raises `CannotPackError` unless the whole batch gives what each text gave alone."""
    tolerance = _TOLERANCE.get(dtype, _COARSE_TOLERANCE)
    for pair, value in zip(_states(runner, batch), expected, strict=True):
        got = head(*pair)
        error = float((got - value).abs().max())
        if not error <= tolerance * max(1.0, float(value.abs().max())):
            raise CannotPackError(f"results differ by {error:.1e}")


def _proof_batch(model: Any) -> list[PoolRequest]:
    """A few texts of tokens from all over the vocabulary; the last is a pair."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    batch = []
    for name, length in enumerate(_PROOF_LENGTHS):
        tokens = [(13 + 7919 * (i + 31 * name)) % vocabulary for i in range(length)]
        second = length // 2 if name == 2 else None
        batch.append(PoolRequest(str(name), "proof", tokens, 0.0, second))
    return batch


def _states(runner: Runner, batch: Sequence[PoolRequest]) -> list[tuple[torch.Tensor, list[int]]]:
    hidden = runner.hidden(batch)
    return [(states, request.tokens) for states, request in zip(hidden, batch, strict=True)]


def _weight_bytes(model: Any) -> int:
    packed = sum(m.nbytes for m in model.modules() if isinstance(m, CpuLinear))
    return packed + sum(parameter.nbytes for parameter in model.parameters())


def _labels(config: Any, size: int) -> tuple[str, ...]:
    names = config.id2label or {}
    return tuple(str(names.get(i, f"LABEL_{i}")) for i in range(size))


def _activation(config: Any, size: int) -> str:
    """What turns a classifier's logits into probabilities or scores."""
    cross_encoder = getattr(config, "sentence_transformers", None) or {}
    named = cross_encoder.get("activation_fn") or getattr(
        config, "sbert_ce_default_activation_function", None
    )
    if named is not None:
        kind = str(named).rpartition(".")[2].lower()
        if kind not in ("identity", "sigmoid"):
            raise UnsupportedModelError(f"unknown activation of a cross-encoder: {named}")
        return kind
    if config.problem_type == "regression":
        return "identity"
    multi_label = config.problem_type == "multi_label_classification"
    return "sigmoid" if multi_label or size == 1 else "softmax"
