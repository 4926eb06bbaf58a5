"""`slipstream plan`: how many replicas on what hardware carry a trace within an SLO, and the price.

Replicas are found by bisection over the twin, for each hardware; the cheapest comes first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from config.flags import OneLineParser
from loadtest.flags import add_trace_flags, new_file, positive
from loadtest.slo import load_slo
from loadtest.traces import TraceRequest
from loadtest.twin.hardware import Hardware, hardware_names, load_hardware
from loadtest.twin.model_card import QUANTIZED_BITS, ModelCard, context_of, load_card
from loadtest.twin.routing import ROUTERS
from loadtest.twin.simulate import trace_of
from loadtest.twin.sizing import Plan, cost_per_million, fewest_replicas, smallest_server


def main(arguments: Sequence[str]) -> int:
    """Print and write. Returns 0, 1 if no hardware does it, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        slo = load_slo(options.slo)
        card = load_card(options.model, options.quantization)
        machines = [load_hardware(name) for name in options.hardware or hardware_names()]
        context = context_of(card, options.max_model_len)
        trace, notes = trace_of(options, context)
    except (OSError, ValueError) as error:
        print(f"slipstream plan: error: {error}", file=sys.stderr)
        return 2
    print(_about(card, trace))
    for note in notes:
        print(f"note: {note}")
    rows: list[dict[str, Any]] = []
    for machine in machines:
        server = smallest_server(card, machine, options.max_model_len, options.devices)
        found = None
        if server is not None:
            found = fewest_replicas(server, trace, slo, options.routing)
        rows.append(_row(machine, found, fits=server is not None))
    rows.sort(key=lambda row: row.get("dollars_per_day", float("inf")))
    print("\n".join(map(_text, rows)))
    if options.out:
        content = {"schema": 1, "model": card.name, "trace": options.trace.name, "plans": rows}
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
    return int("replicas" not in rows[0])


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="slipstream plan",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="recorded traffic")
    parser.add_argument("--slo", type=Path, required=True, help="YAML file of limits")
    add_trace_flags(parser.add_argument_group("replay"), named=False)
    parser.add_argument("--repeat-trace", type=positive(int), default=1, help="times, end to end")
    parser.add_argument("--model", default="", help="folder with config.json; default: built-in")
    parser.add_argument("--hardware", action="append", metavar="H",
                        help="name in config/hardware or YAML file; default: all")  # fmt: skip
    parser.add_argument("--devices", type=positive(int), help="a replica; default: the fewest")
    choices = ("none", *QUANTIZED_BITS)
    parser.add_argument("--quantization", choices=choices, default="none", help="weights")
    parser.add_argument("--max-model-len", type=positive(int), help="default: the model's")
    parser.add_argument("--routing", choices=list(ROUTERS), default="least-loaded", help="between")
    parser.add_argument("--seed", type=int, default=0, help="of the trace's changes")
    parser.add_argument("--out", type=new_file, help="JSON file to write")
    return parser


def _about(card: ModelCard, trace: Sequence[TraceRequest]) -> str:
    seconds = max(trace[-1].offset, 1e-9)
    tokens = sum(r.output_tokens for r in trace)
    return (
        f"{card.name}: {len(trace)} requests in {seconds:,.0f} s, {len(trace) / seconds:.2f} a "
        f"second, {tokens / seconds:,.0f} output tokens a second"
    )


def _row(machine: Hardware, plan: Plan | None, *, fits: bool) -> dict[str, Any]:
    if plan is None:
        why = "no number of replicas keeps the SLO" if fits else "the model does not fit"
        return {"hardware": machine.name, "why_not": why}
    found = plan.figures
    rate = found["output tokens/s"] / plan.replicas
    return {
        "hardware": machine.name,
        "devices": plan.server.devices,
        "replicas": plan.replicas,
        "dollars_per_day": plan.price_per_day,
        "dollars_per_million_output_tokens": cost_per_million(plan.server, rate),
        "busy_share": plan.busy_share,
        "figures": found,
    }


def _text(row: dict[str, Any]) -> str:
    if "replicas" not in row:
        return f"{row['hardware']}: {row['why_not']}"
    found = row["figures"]
    return (
        f"{row['replicas']} replicas of {row['devices']} × {row['hardware']}: "
        f"${row['dollars_per_day']:,.2f} a day, "
        f"${row['dollars_per_million_output_tokens']:.2f} per million output tokens; "
        f"busy {row['busy_share']:.0%}, TTFT p95 {found['TTFT p95']:,.0f} ms, "
        f"TPOT p50 {found.get('TPOT p50', 0):.1f} ms"
    )
