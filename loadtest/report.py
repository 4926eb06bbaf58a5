"""One run as text for the terminal, as JSON for everything else, and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from loadtest.events import Outcome
from loadtest.html import page
from loadtest.measure import PERCENTILES
from loadtest.slo import tpot, ttft
from loadtest.timeline import quantiles, steady, timeline

SCHEMA = 2  # of the JSON file; raised when a field changes its meaning

_COLUMNS = ("mean", *(f"p{percent}" for percent in PERCENTILES), "max")
_MOST_SAMPLES = 200  # of the server's gauges, kept in the file


def course(outcomes: Sequence[Outcome], samples: Sequence[dict[str, float]] = ()) -> dict[str, Any]:
    """The parts of a result that a page draws. `samples` are on the outcomes' clock."""
    start = min(o.scheduled for o in outcomes)
    good = [o for o in outcomes if o.error is None]
    every = -(-len(samples) // _MOST_SAMPLES) or 1
    times = {"ttft": map(ttft, good), "tpot": map(tpot, good)}
    return {
        "steady": steady(outcomes),
        "timeline": timeline(outcomes),
        "server": [sample | {"t": sample["t"] - start} for sample in samples[::every]],
        "quantiles": {
            name: [1e3 * s for s in quantiles([s for s in seconds if s is not None])]
            for name, seconds in times.items()
        },
    }


def write(result: dict[str, Any], out: Path | None, html: Path | None) -> None:
    """The files that were asked for."""
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    if html is not None:
        html.write_text(page(result))


def render(result: dict[str, Any]) -> str:
    """A table of at most 100 columns."""
    summary = result["summary"]
    requests, throughput = summary["requests"], summary["throughput"]
    lines = [
        f"{result['model']} at {result['url']}: {result['load']}",
        f"{requests['completed']} of {requests['sent']} requests in {summary['seconds']:.2f} s, "
        f"{throughput['requests_per_second']:.2f} a second",
        f"output {throughput['output_tokens_per_second']:,.1f} tokens/s, "
        f"with input {throughput['total_tokens_per_second']:,.1f} tokens/s, "
        f"{summary['tokens']['cached']:,} input tokens cached",
        "",
        f"{'ms':<10}" + "".join(f"{column:>11}" for column in _COLUMNS),
    ]
    rows = {**summary["latency_ms"], "send lag": summary["send_lag_ms"]}
    lines += [_row(name, figures) for name, figures in rows.items()]
    lines.append("")
    lines += _parts(result)
    if "connections" in result:
        peak, cap = result["connections"]["peak"], result["connections"]["cap"]
        lines.append(f"connections: {peak} (cap {cap})")
    for kind, count in summary["errors"].items():
        example = summary["error_examples"][kind]
        lines.append(f"error: {kind}: {count}" + (f", such as {example}" if example else ""))
    lines += [f"disagreement: {kind}: {n}" for kind, n in summary["disagreements"].items()]
    lines += [f"warning: {text}" for text in result["warnings"]]
    return "\n".join(lines)


def _parts(result: dict[str, Any]) -> list[str]:
    """Lines on what not every result has."""
    summary, lines = result["summary"], []
    if found := result.get("steady"):
        lines.append(
            f"steady from {found['from']:.1f} to {found['to']:.1f} s: "
            f"{found['output_tokens_per_second']:,.1f} output tokens/s, "
            f"{found['in_flight']:.1f} in flight"
        )
    if kept := summary.get("goodput"):
        groups = ", ".join(f"{name} {part:.1%}" for name, part in kept["groups"].items())
        lines.append(
            f"within the SLO: {kept['share']:.1%} ({groups}), "
            f"goodput {kept['requests_per_second']:.2f} requests/s"
        )
    if summary.get("fairness") is not None:
        lines.append(f"fairness between groups (Jain): {summary['fairness']:.3f}")
    if asked := summary.get("json"):
        lines.append(f"JSON: {asked['valid']} of {asked['asked']} answers valid")
    for name, figures in result.get("confidence", {}).items():
        lines.append(f"{name}: {figures['mean']:,.2f} ± {figures['half_width']:,.2f} (95 %)")
    if found := result.get("find_rate"):
        best = "none" if found["rate"] is None else f"{found['rate']:.2f} requests/s"
        lines.append(f"highest rate within the SLO: {best}, of {len(found['probes'])} tried")
    for check in result.get("chaos", []):
        verdict = "passed" if check["passed"] else "FAILED"
        lines.append(f"chaos: {check['name']}: {verdict} {check['detail']}".rstrip())
    return lines


def _row(name: str, figures: dict[str, float] | None) -> str:
    label = f"{name.upper() if len(name) <= 4 else name:<10}"
    if figures is None:
        return label + "none"
    return label + "".join(f"{figures[column]:>11.2f}" for column in _COLUMNS)
