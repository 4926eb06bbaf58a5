"""Where step times come from: a profile that was measured, or an estimate from specifications.

Hardware files are in `config/hardware`: peak arithmetic and bandwidth, what share of them is
reached in practice, memory, price, and the sources.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

import config
from batching.core.step_time import StepTime
from batching.core.types import Limits
from config.sizes import ON_ACCELERATOR, ON_CPU, Sizes
from loadtest.twin.model_card import ModelCard
from loadtest.twin.replica import FrontEnd

FOLDER = Path(config.__file__).parent / "hardware"
_KNOTS = tuple(1 << i for i in range(14))


class Hardware(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device (or one machine, if it is a CPU). Rates are peaks for 16-bit numbers, dense."""

    name: str
    kind: str  # cpu or gpu
    flops: float  # per second
    bandwidth: float  # bytes/s
    memory: float  # bytes
    price_per_hour: float  # US dollars
    sources: list[str]
    flops_share: float = 0.6  # of the peak that matrix products of a step reach
    attention_share: float = 0.3  # of the peak that prefill attention reaches
    bandwidth_share: float = 0.75  # of the peak that reading weights and KV reaches
    step_seconds: float = 0.0003  # per step beside that: planning, launches, sampling
    layer_seconds: float = 0.0  # per layer and step
    usable_memory: float = 0.9  # share for weights, KV and activations


class HardwareError(ValueError):
    """There is no such hardware, or its file is wrong."""


def hardware_names() -> list[str]:
    """All files that are shipped."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_hardware(name: str) -> Hardware:
    """A shipped file by its name, or any file by its path. Raises `HardwareError`."""
    import yaml

    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        return msgspec.convert(yaml.safe_load(path.read_text()), Hardware)
    except OSError as error:
        known = ", ".join(hardware_names())
        raise HardwareError(f"there is no hardware {name!r}; known: {known}") from error
    except (yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise HardwareError(f"{path}: {' '.join(str(error).split())}") from error


class Profile(msgspec.Struct, frozen=True):
    """What `slipstream calibrate` wrote, as far as it matters here."""

    step_time: StepTime
    limits: Limits
    front: FrontEnd = FrontEnd()
    model: str = ""
    machine: str = ""


def load_profile(path: Path) -> Profile:
    """A measured profile. Raises `HardwareError`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except (OSError, msgspec.DecodeError) as error:
        raise HardwareError(f"{path} is no profile of slipstream calibrate: {error}") from error


def estimated_step_time(model: ModelCard, hardware: Hardware, devices: int = 1) -> StepTime:
    """A step's time by the roofline: weights read once, arithmetic for each row, the larger counts;
    the same for attention. Devices share all work evenly; their talking is part of the shares."""
    flops = hardware.flops * hardware.flops_share * devices
    bandwidth = hardware.bandwidth * hardware.bandwidth_share * devices
    fixed = hardware.step_seconds + model.layers * hardware.layer_seconds
    head = model.head_parameters
    curve = []
    for rows in _KNOTS:
        read = model.weights_read(rows) / bandwidth
        compute = 2 * (model.active_parameters - head) * rows / flops
        curve.append(fixed + max(read, compute))
    attention = hardware.flops * hardware.attention_share * devices
    return StepTime(
        _KNOTS,
        tuple(curve),
        sample=2 * head / flops,
        context=model.kv_bytes_per_token / bandwidth,
        pair=4 * model.layers * model.heads * model.head_dim / attention,
    )


def estimated_limits(
    model: ModelCard,
    hardware: Hardware,
    devices: int = 1,
    *,
    max_model_len: int | None = None,
    max_sequences: int | None = None,
    block_size: int = 32,
) -> Limits | None:
    """The limits that a server would have here; None if not even one sequence fits."""
    context = min(max_model_len or model.context, model.context)
    usual = usual_sizes(hardware)
    free = kv_memory(model, hardware, devices, usual.max_step_tokens)
    blocks = int(free // (model.kv_bytes_per_token * block_size))
    if blocks * block_size < context:
        return None
    return Limits(
        num_blocks=blocks,
        block_size=block_size,
        max_sequences=max_sequences or usual.max_sequences,
        max_model_len=context,
        max_step_tokens=usual.max_step_tokens,
        overlap=0 if hardware.kind == "cpu" else 1,
    )


def usual_sizes(hardware: Hardware) -> Sizes:
    """What a server computes at once there, where it is not told."""
    return ON_CPU if hardware.kind == "cpu" else ON_ACCELERATOR


def kv_memory(model: ModelCard, hardware: Hardware, devices: int, step_tokens: int) -> float:
    """Bytes that weights and activations leave to the KV cache; may be negative."""
    # The widest moment of a layer: its input, gate and up of the MLP, and a row of logits each
    # for as many sequences as are sampled at once.
    activations = 2 * step_tokens * (4 * model.hidden + 2 * model.intermediate)
    logits = 4 * 256 * model.vocab
    usable = hardware.memory * hardware.usable_memory * devices
    return usable - model.weight_bytes - activations - logits


def describe(found: Hardware | Profile) -> dict[str, Any]:
    """For the report."""
    if isinstance(found, Profile):
        return {"profile of": found.model, "machine": found.machine}
    return {"hardware": found.name, "estimated": True}
