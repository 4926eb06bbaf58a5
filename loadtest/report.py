"""One run as text for the terminal and as JSON for everything else."""

from __future__ import annotations

from typing import Any

from loadtest.measure import PERCENTILES

SCHEMA = 1  # of the JSON file; raised when a field changes its meaning

_COLUMNS = ("mean", *(f"p{percent}" for percent in PERCENTILES), "max")


def render(result: dict[str, Any]) -> str:
    """A table of at most 80 columns."""
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
    lines += [
        "",
        f"connections: {result['connections']['peak']} (cap {result['connections']['cap']})",
    ]
    for kind, count in summary["errors"].items():
        example = summary["error_examples"][kind]
        lines.append(f"error: {kind}: {count}" + (f", such as {example}" if example else ""))
    lines += [f"disagreement: {kind}: {n}" for kind, n in summary["disagreements"].items()]
    lines += [f"warning: {text}" for text in result["warnings"]]
    return "\n".join(lines)


def _row(name: str, figures: dict[str, float] | None) -> str:
    label = f"{name.upper() if len(name) <= 4 else name:<10}"
    if figures is None:
        return label + "none"
    return label + "".join(f"{figures[column]:>11.2f}" for column in _COLUMNS)
