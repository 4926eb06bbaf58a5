"""`slipstream simulate`: what a server, or a hundred, would do under recorded or made-up traffic.

The production scheduler and block pool run on a virtual clock; only the worker is replaced, by a
step time that was measured (`slipstream calibrate`) or estimated from specifications.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from batching.core.step_time import StepTime
from batching.core.types import Limits
from config.flags import OneLineParser
from loadtest.compare import load
from loadtest.events import Outcome
from loadtest.figures import figures
from loadtest.flags import add_trace_flags, new_file, positive
from loadtest.measure import summarize
from loadtest.report import SCHEMA, course, render, write
from loadtest.slo import Slo, load_slo
from loadtest.traces import TraceRequest, adapted, clipped, load_trace
from loadtest.twin.fleet import Fleet
from loadtest.twin.hardware import (
    describe,
    estimated_limits,
    estimated_step_time,
    load_hardware,
    load_profile,
)
from loadtest.twin.jobs import jobs_like, trace_jobs
from loadtest.twin.model_card import QUANTIZED_BITS, context_of, load_card
from loadtest.twin.replica import FrontEnd
from loadtest.twin.routing import ROUTERS

_EVERY_TOKEN = 3_000_000  # output tokens up to which the time of each is kept
_SAMPLES = 150


@dataclass(frozen=True)
class Twin:
    """A server to simulate."""

    name: str
    limits: Limits
    step_time: StepTime
    about: dict[str, Any]
    front: FrontEnd | None = None  # the usual one


def main(arguments: Sequence[str]) -> int:
    """Simulate, print and write. Returns 0, 1 if a request was refused, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        result = _result(options)
    except (OSError, ValueError) as error:
        print(f"slipstream simulate: error: {error}", file=sys.stderr)
        return 2
    print(render(result))
    for row in result.get("predicted", []):
        print(
            f"{row['figure']:<20} predicted {row['predicted']:>10.2f}, "
            f"measured {row['measured']:>10.2f} ({row['error_percent']:+.1f} %)"
        )
    write(result, options.out, options.html)
    return int(bool(result["summary"]["errors"]))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="slipstream simulate",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("trace", nargs="?", type=Path, metavar="TRACE", help="recorded traffic")
    load.add_argument(
        "--like", type=Path, metavar="RESULT.json",
        help="the load of a result of slipstream bench, and its figures beside the prediction",
    )  # fmt: skip
    add_trace_flags(parser.add_argument_group("replay"), named=False)
    parser.add_argument("--repeat-trace", type=positive(int), default=1, help="times, end to end")
    add_twin_flags(parser)
    parser.add_argument("--replicas", type=positive(int), default=1, help="simulated servers")
    parser.add_argument("--routing", choices=list(ROUTERS), default="least-loaded", help="between")
    parser.add_argument("--slo", type=Path, help="YAML file of limits, for goodput")
    parser.add_argument("--seed", type=int, default=0, help="of what is random in the load")
    parser.add_argument("--out", type=new_file, help="JSON file to write")
    parser.add_argument("--html", type=new_file, help="report to write")
    return parser


def add_twin_flags(parser: argparse.ArgumentParser) -> None:
    """What is simulated."""
    group = parser.add_argument_group("server")
    group.add_argument("--model", default="", help="folder with config.json; default: built-in")
    group.add_argument(
        "--hardware", default="cpu-amx-2core", help="name in config/hardware, or profile.json"
    )
    group.add_argument("--devices", type=positive(int), default=1, help="that share the model")
    group.add_argument("--max-sequences", type=positive(int), help="default: the server's")
    group.add_argument("--max-model-len", type=positive(int), help="default: the model's")
    choices = ("none", *QUANTIZED_BITS)
    group.add_argument("--quantization", choices=choices, default="none", help="weights")


def twin_of(options: argparse.Namespace) -> Twin:
    """The server that flags describe. Raises `ValueError` (it does not fit, unknown names)."""
    changed = {
        name: value
        for name in ("max_sequences", "max_model_len")
        if (value := getattr(options, name)) is not None
    }
    if options.hardware.endswith(".json"):
        profile = load_profile(Path(options.hardware))
        limits = msgspec.structs.replace(profile.limits, **changed)
        return Twin(profile.model, limits, profile.step_time, describe(profile), profile.front)
    card, hardware = load_card(options.model, options.quantization), load_hardware(options.hardware)
    context_of(card, options.max_model_len)
    found = estimated_limits(card, hardware, options.devices, **changed)
    if found is None:
        raise ValueError(
            f"{card.name} does not fit on {options.devices} × {hardware.name} "
            "(slipstream fit says what would)"
        )
    step_time = estimated_step_time(card, hardware, options.devices)
    about = describe(hardware) | {"devices": options.devices}
    return Twin(card.name, found, step_time, about)


def trace_of(options: argparse.Namespace, context: int) -> tuple[list[TraceRequest], list[str]]:
    """The adapted trace, cut to the context, and notes on what was changed."""
    recorded = load_trace(options.trace)
    times = getattr(options, "repeat_trace", 1)
    length = recorded[-1].offset + recorded[-1].offset / max(1, len(recorded) - 1)
    repeated = [
        msgspec.structs.replace(
            r, offset=r.offset + turn * length, blocks=tuple(b + (turn << 44) for b in r.blocks)
        )
        for turn in range(times)
        for r in recorded
    ]
    trace = adapted(
        repeated,
        start=options.start,
        seconds=options.seconds,
        rate_scale=options.rate_scale,
        time_scale=options.time_scale,
        length_scale=options.length_scale,
        seed=options.seed,
    )
    trace, cut = clipped(trace, context)
    notes = [f"{cut} of {len(trace)} requests were cut to the context of {context}"] if cut else []
    return trace, notes


def simulate_trace(
    twin: Twin,
    trace: Sequence[TraceRequest],
    replicas: int,
    routing: str,
) -> tuple[list[Outcome], Fleet]:
    """Run a trace. Outcomes in its order, and the fleet as it is afterwards."""
    tokens = sum(request.output_tokens for request in trace)
    fleet = Fleet(
        twin.limits,
        twin.step_time,
        ROUTERS[routing](),
        replicas,
        twin.front,
        every_token=tokens <= _EVERY_TOKEN,
    )
    every = max(trace[-1].offset / _SAMPLES, 1e-3)
    return fleet.open_loop(trace_jobs(trace), every), fleet


def _result(options: argparse.Namespace) -> dict[str, Any]:
    twin, began = twin_of(options), time.perf_counter()
    slo = load_slo(options.slo) if options.slo else None
    if options.like is not None:
        measured = load(options.like)
        outcomes, fleet, title = jobs_like(measured, twin, options.routing, options.replicas)
        found = _figures(outcomes, fleet, slo) | {
            "predicted": beside(outcomes, measured, slo),
            "load": f"{title}, simulated",
        }
        notes: list[str] = []
    else:
        trace, notes = trace_of(options, twin.limits.max_model_len)
        outcomes, fleet = simulate_trace(twin, trace, options.replicas, options.routing)
        found = _figures(outcomes, fleet, slo)
        found["load"] = f"replay of {options.trace.name} on {options.replicas} simulated replicas"
    stats = [replica.scheduler.stats() for replica in fleet.replicas]
    return {
        "schema": SCHEMA,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "url": ", ".join(f"{key} {value}" for key, value in twin.about.items()),
        "model": twin.name,
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
            if value is not None
        },
        "twin": {
            **twin.about,
            "replicas": options.replicas,
            "routing": options.routing,
            "limits": msgspec.to_builtins(twin.limits),
            "steps": sum(s.steps for s in stats),
            "preemptions": sum(s.preemptions for s in stats),
            "busy_share": sum(r.busy_seconds for r in fleet.replicas)
            / max(fleet.now * options.replicas, 1e-9),
            "virtual_seconds": fleet.now,
            "real_seconds": time.perf_counter() - began,
        },
        "warnings": notes,
    } | found


def _figures(outcomes: list[Outcome], fleet: Fleet, slo: Slo | None) -> dict[str, Any]:
    return {"summary": fleet.summary(outcomes, slo)} | course(outcomes, fleet.samples)


def beside(
    outcomes: list[Outcome], measured: dict[str, Any], slo: Slo | None
) -> list[dict[str, Any]]:
    """Predicted and measured figures, for the report."""
    predicted, real = figures(summarize(outcomes, slo)), figures(measured["summary"])
    return [
        {
            "figure": name,
            "predicted": predicted[name],
            "measured": real[name],
            "error_percent": (predicted[name] / real[name] - 1) * 100 if real[name] else 0.0,
        }
        for name in predicted
        if name in real
    ]
