"""Folders with models of Llama's plain shape, read without transformers.

Importing transformers takes longer than all else that the start of a small model needs. So what is
surely the same without it is read here: a configuration of which every key is known and says what
the C++ decoder computes, and files with exactly the weights that follow from it. Transformers loads
(or refuses) everything else, and `tests/worker/test_checkpoint.py` compares bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from batching.worker.attention import AttentionBackend, LayerSpec
from batching.worker.cpu import decoder
from batching.worker.cpu.attention import CpuAttention
from batching.worker.device import serving_dtype
from batching.worker.llama_shape import CLASSES, LayerWeights, LlamaWeights, Shape
from batching.worker.protocol import WorkerConfig
from batching.worker.runner import Pages, Runner
from batching.worker.start_up import choose_max_model_len, end_tokens
from batching.worker.stored import stored_tensors

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _Rope(msgspec.Struct, forbid_unknown_fields=True):
    rope_theta: float
    rope_type: Literal["default"] = "default"


class _Config(msgspec.Struct, forbid_unknown_fields=True):
    """config.json. What has no default here has various ones, so it must be there."""

    architectures: tuple[str]
    model_type: Literal["llama", "mistral", "qwen2", "qwen3"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    hidden_act: Literal["silu"]
    head_dim: int | None = None
    rope_parameters: _Rope | None = None
    rope_theta: float | None = None
    rope_scaling: None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    eos_token_id: int | list[int] | None = None
    layer_types: list[Literal["full_attention"]] | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    # These change nothing here.
    attention_dropout: float = 0.0
    bos_token_id: Any = None
    initializer_range: Any = None
    max_window_layers: Any = None
    pad_token_id: Any = None
    pretraining_tp: Any = None
    transformers_version: Any = None
    use_cache: Any = None

    def theta(self) -> float:
        """The base of the rotary frequencies. Raises `ValueError` if it is not said."""
        theta = self.rope_theta if self.rope_parameters is None else self.rope_parameters.rope_theta
        if theta is None:
            raise ValueError("no rope_theta")
        return theta

    def check(self) -> None:
        """Raise `ValueError` if the model is not plain."""
        is_qwen = self.model_type.startswith("qwen")
        windows = self.use_sliding_window if is_qwen else self.sliding_window is not None
        if self.architectures != (CLASSES[self.model_type],):
            raise ValueError(f"it is a {self.architectures[0]}")
        if windows or self.attention_bias or self.mlp_bias:
            raise ValueError("it has windows or biases")
        if self.model_type == "qwen3" and self.head_dim is None:
            raise ValueError("no head_dim")
        self.theta()

    def shape(self) -> Shape:
        head = self.head_dim or self.hidden_size // self.num_attention_heads
        return Shape(
            self.hidden_size,
            self.intermediate_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            head,
            head,
        )


class _GenerationConfig(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


def open_checkpoint(
    config: WorkerConfig, progress: Callable[[str, float], None]
) -> Checkpoint | None:
    """The model, if it can be read here and served as asked; else None."""
    if config.attention not in ("auto", "cpu") or config.tensor_parallel > 1:
        return None
    if config.quantization not in decoder.QUANTIZATIONS:
        return None
    try:
        return Checkpoint(config, progress)
    except (OSError, ValueError, SafetensorError) as error:
        logger.info("transformers loads the model: %s", error)
        return None


class Checkpoint:
    """Implements `runner.Loaded`. Raises ValueError, OSError or `SafetensorError`."""

    step_bytes = 0

    def __init__(self, config: WorkerConfig, progress: Callable[[str, float], None]) -> None:
        folder = Path(config.model)
        self._config = found = _read(folder / "config.json", _Config)
        found.check()
        self._shape = shape = found.shape()
        refusal = decoder.refuses(shape)
        if refusal is not None:
            raise ValueError(refusal)
        self._files = _Files(folder)
        self._files.check(_expected(found, shape))
        self._progress, self._int8 = progress, config.quantization == "int8"
        self.architecture, self.vocab_size = found.architectures[0], found.vocab_size
        stored = found.dtype or found.torch_dtype
        self.dtype = serving_dtype(
            config.dtype, stored and getattr(torch, stored), torch.device("cpu")
        )
        self.max_model_len = choose_max_model_len(config.max_model_len, found, None)
        generation = folder / "generation_config.json"
        known = [_read(generation, _GenerationConfig)] if generation.exists() else []
        self.end_tokens = end_tokens(*known, found)
        scale = shape.head_dim**-0.5
        self.specs = [
            LayerSpec(shape.heads, shape.kv_heads, shape.head_dim, scale)
            for _ in range(found.num_hidden_layers)
        ]

    def bind(self, backend: AttentionBackend, pages: Pages) -> Runner:
        """The C++ decoder, with weights that are read as they are packed."""
        assert isinstance(backend, CpuAttention)
        return decoder.CpuDecoder(
            self._weights(), self.specs, backend, pages, self.dtype, int8=self._int8
        )

    def _weights(self) -> LlamaWeights:
        config, tied = self._config, self._config.tie_word_embeddings
        outer = self._read("model.embed_tokens.weight", "model.norm.weight")
        embedding = outer["model.embed_tokens.weight"]
        if self._int8 or not tied:  # it stays as it is, and not in the file
            embedding = embedding.to(self.dtype, copy=True)
        head = embedding if tied else self._read("lm_head.weight")["lm_head.weight"]
        return LlamaWeights(
            self._layers(),
            config.num_hidden_layers,
            config.vocab_size,
            config.intermediate_size,
            embedding,
            head,
            outer["model.norm.weight"],
            config.rms_norm_eps,
            *_rotary(config.theta(), self._shape.rotary, self.max_model_len),
        )

    def _layers(self) -> Iterator[LayerWeights]:
        count = self._config.num_hidden_layers
        suffixes = _layer_shapes(self._config, self._shape)
        for index in range(count):
            self._progress("pack", index / count)
            prefix = f"model.layers.{index}."
            found = self._read(*(prefix + suffix for suffix in suffixes))
            yield _layer({name.removeprefix(prefix): tensor for name, tensor in found.items()})

    def _read(self, *names: str) -> dict[str, torch.Tensor]:
        found = self._files.read(names).items()
        # Matrices are rounded as they are packed.
        return {n: tensor.to(self.dtype) if tensor.dim() == 1 else tensor for n, tensor in found}


class _Files:
    """The tensors of a folder's safetensors files, one or many."""

    def __init__(self, folder: Path) -> None:
        self._stored = stored_tensors(folder)

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise `ValueError` unless exactly these are there, with these shapes."""
        if self._stored.keys() != expected.keys():
            name = min(self._stored.keys() ^ expected.keys())
            raise ValueError(f"{name} is missing, or should be")
        for name, tensor in self._stored.items():
            if tensor.shape != expected[name]:
                raise ValueError(f"{name} has an unexpected shape")

    def read(self, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Tensors whose memory is the file's."""
        paths: dict[Path, list[str]] = {}
        for name in wanted:
            paths.setdefault(self._stored[name].path, []).append(name)
        found: dict[str, torch.Tensor] = {}
        # Opened anew each time: what was read is no memory of ours when it is not used any more.
        for path, names in paths.items():
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in names}
        return found


def _read(path: Path, kind: type[T]) -> T:
    return msgspec.json.decode(path.read_bytes(), type=kind)


def _expected(config: _Config, shape: Shape) -> dict[str, tuple[int, ...]]:
    """All tensors of such a model by name, and their shapes."""
    table = (config.vocab_size, shape.hidden)
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": table,
        "model.norm.weight": (shape.hidden,),
    }
    if not config.tie_word_embeddings:
        expected["lm_head.weight"] = table
    layer = _layer_shapes(config, shape)
    for index in range(config.num_hidden_layers):
        expected |= {f"model.layers.{index}.{suffix}": size for suffix, size in layer.items()}
    return expected


def _layer_shapes(config: _Config, shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, wide = shape.hidden, shape.intermediate
    queries, keys = (heads * shape.head_dim for heads in (shape.heads, shape.kv_heads))
    found: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.model_type == "qwen2":
        widths = {"q": queries, "k": keys, "v": keys}
        found |= {f"self_attn.{name}_proj.bias": (width,) for name, width in widths.items()}
    if config.model_type == "qwen3":
        found |= {f"self_attn.{name}_norm.weight": (shape.head_dim,) for name in "qk"}
    return found


def _layer(found: dict[str, torch.Tensor]) -> LayerWeights:
    biases = (found.get(f"self_attn.{name}_proj.bias") for name in "qkv")
    return LayerWeights(
        qkv=tuple(found[f"self_attn.{name}_proj.weight"] for name in "qkv"),
        biases=tuple(bias for bias in biases if bias is not None) or None,
        output=found["self_attn.o_proj.weight"],
        gate=found["mlp.gate_proj.weight"],
        up=found["mlp.up_proj.weight"],
        down=found["mlp.down_proj.weight"],
        input_norm=found["input_layernorm.weight"],
        post_norm=found["post_attention_layernorm.weight"],
        query_norm=found.get("self_attn.q_norm.weight"),
        key_norm=found.get("self_attn.k_norm.weight"),
    )


def _rotary(theta: float, width: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines float32 [positions, width / 2], with the bits that transformers gives."""
    frequencies = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float) / width))
    angles = torch.arange(positions)[:, None].float() * frequencies
    return angles.cos(), angles.sin()
