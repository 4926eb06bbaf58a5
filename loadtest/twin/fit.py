"""`slipstream fit`: whether a model fits, on what, how fast it would be and what it would cost.

From its config.json alone; no weights are needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from config.flags import OneLineParser
from loadtest.flags import new_file, positive
from loadtest.slo import Limits as SloLimits
from loadtest.slo import Slo, load_slo
from loadtest.twin.hardware import Hardware, hardware_names, load_hardware
from loadtest.twin.model_card import QUANTIZED_BITS, ModelCard, context_of, load_card
from loadtest.twin.sizing import (
    DEVICES,
    Server,
    Shape,
    alone,
    cost_per_million,
    goodput,
    saturated,
    shortage,
    smallest_server,
)

USUAL_SLO = Slo(default=SloLimits(ttft_ms=2000, tpot_ms=100))
_GB = 1e9


def main(arguments: Sequence[str]) -> int:
    """Print and write. Returns 0, 1 if it fits on nothing that was asked for, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        card = load_card(options.model, options.quantization)
        shape = Shape(options.input_tokens, options.output_tokens)
        slo = load_slo(options.slo) if options.slo else USUAL_SLO
        machines = [load_hardware(name) for name in options.hardware or hardware_names()]
        context = context_of(card, options.max_model_len)
        if shape.input_tokens + shape.output_tokens > context:
            raise ValueError(f"requests of this length exceed the context of {context}")
    except (OSError, ValueError) as error:
        print(f"slipstream fit: error: {error}", file=sys.stderr)
        return 2
    print(_about(card, shape, slo))
    rows = [_examine(card, machine, shape, slo, options) for machine in machines]
    for row in rows:
        print(f"\n{_text(row)}")
    if options.out:
        content = {"schema": 1, "model": msgspec.to_builtins(card), "hardware": rows}
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
    return int(not any(row["fits"] for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="slipstream fit",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", nargs="?", default="", metavar="MODEL",
                        help="config.json, or a folder with one; default: built-in")  # fmt: skip
    parser.add_argument("--hardware", action="append", metavar="H",
                        help="name in config/hardware or YAML file; default: all")  # fmt: skip
    parser.add_argument("--devices", type=positive(int), help="default: the fewest it fits on")
    choices = ("none", *QUANTIZED_BITS)
    parser.add_argument("--quantization", choices=choices, default="none", help="weights")
    parser.add_argument("--max-model-len", type=positive(int), help="default: the model's")
    parser.add_argument("--input-tokens", type=positive(int), default=1000, help="mean prompt")
    parser.add_argument("--output-tokens", type=positive(int), default=200, help="mean output")
    parser.add_argument("--slo", type=Path, help="YAML; default: TTFT 2 s, TPOT 100 ms, 95 %%")
    parser.add_argument("--out", type=new_file, help="JSON file to write")
    return parser


def _about(card: ModelCard, shape: Shape, slo: Slo) -> str:
    active = ""
    if card.experts:
        active = f" ({_count(card.active_parameters)} active)"
    return (
        f"{card.name}: {_count(card.parameters)} parameters{active}, "
        f"weights {card.weight_bytes / _GB:.2f} GB at {card.weight_bits:g} bits, "
        f"KV cache {card.kv_bytes_per_token:,} bytes a token, context {card.context:,}\n"
        f"requests of {shape.input_tokens} tokens in and {shape.output_tokens} out on average; "
        f"{slo.share:.0%} must keep {_limits(slo)}"
    )


def _count(parameters: int) -> str:
    if parameters < 1e8:
        return f"{parameters / 1e6:.1f} million"
    return f"{parameters / 1e9:.2f} billion"


def _limits(slo: Slo) -> str:
    limits = msgspec.to_builtins(slo.default)
    kept = [f"{name[:-3].upper()} {value:g} ms" for name, value in limits.items() if value]
    return ", ".join(kept) or "no limit"


def _examine(
    card: ModelCard, machine: Hardware, shape: Shape, slo: Slo, options: argparse.Namespace
) -> dict[str, Any]:
    """All findings on one hardware."""
    server = smallest_server(card, machine, options.max_model_len, options.devices)
    if server is None:
        return {"hardware": machine.name, "fits": False, "advice": _advice(card, machine, options)}
    tokens = shape.input_tokens + shape.output_tokens
    found: dict[str, Any] = {
        "hardware": machine.name,
        "fits": True,
        "devices": server.devices,
        "kv_tokens": server.limits.num_blocks * server.limits.block_size,
        "concurrent": server.concurrent(tokens),
        "concurrent_at_full_context": server.concurrent(server.limits.max_model_len),
        "alone": alone(server, shape),
        "saturated": saturated(server, shape),
        "goodput": goodput(server, shape, slo),
        "price_per_hour": server.price_per_hour,
        "settings": settings_for(server, options.quantization),
    }
    best = found["goodput"] or found["saturated"]
    found["dollars_per_million_output_tokens"] = cost_per_million(server, best["output tokens/s"])
    return found


def settings_for(server: Server, quantization: str) -> dict[str, Any]:
    """Flags of `slipstream serve` that make the server that was simulated."""
    limits = server.limits
    chosen: dict[str, Any] = {
        "max_model_len": limits.max_model_len,
        "max_sequences": limits.max_sequences,
        "max_step_tokens": limits.max_step_tokens,
        "block_size": limits.block_size,
        "num_blocks": limits.num_blocks,
    }
    if quantization != "none":
        chosen["quantization"] = quantization
    return chosen


def _advice(card: ModelCard, machine: Hardware, options: argparse.Namespace) -> list[str]:
    """What is missing, and what would help."""
    devices = options.devices or (1 if machine.kind == "cpu" else DEVICES[-1])
    context = context_of(card, options.max_model_len)
    missing = shortage(card, machine, context, devices)
    advice = [
        f"{missing / _GB:.1f} GB too little on {devices}, of {machine.memory / _GB:.0f} GB each"
    ]
    room = context - missing / card.kv_bytes_per_token
    if room >= 256:
        advice.append(f"--max-model-len {int(room) // 256 * 256} would fit")
    if card.weight_bits > 8.25:
        half = msgspec.structs.replace(card, weight_bits=8.25)
        if shortage(half, machine, context, devices) <= 0:
            advice.append("--quantization int8 would fit")
    others = []
    for name in hardware_names():
        server = smallest_server(card, load_hardware(name), options.max_model_len)
        if server is not None:
            others.append(f"{server.devices} × {server.hardware.name}")
    advice.append(f"would fit on: {', '.join(others) or 'no hardware that is known here'}")
    return advice


def _text(row: dict[str, Any]) -> str:
    if not row["fits"]:
        return "\n  ".join([f"{row['hardware']}: DOES NOT FIT", *row["advice"]])
    one, most, good = row["alone"], row["saturated"], row["goodput"]
    if good:
        kept = (
            f"within the SLO {good['rate']:.2f} requests/s, {good['output tokens/s']:,.0f} output "
            f"tokens/s, TTFT p95 {good['TTFT p95']:,.0f} ms, TPOT p50 {good['TPOT p50']:.1f} ms"
        )
    else:
        kept = "within the SLO: not even one request at a time; the cost is at full load"
    flags = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in row["settings"].items())
    return "\n  ".join(
        [
            f"{row['devices']} × {row['hardware']}: fits",
            f"KV cache {row['kv_tokens']:,} tokens: {row['concurrent']:,} such requests at once, "
            f"{row['concurrent_at_full_context']:,} of the full context",
            f"alone: TTFT {one['TTFT p50']:,.0f} ms, {1e3 / one['TPOT p50']:,.0f} tokens/s",
            f"at full load {most['output tokens/s']:,.0f} output tokens/s",
            kept,
            f"${row['dollars_per_million_output_tokens']:.2f} per million output tokens "
            f"at ${row['price_per_hour']:.2f} an hour",
            f"slipstream serve {flags}",
        ]
    )
