"""A result as one HTML page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from loadtest.charts import line_chart, short
from loadtest.measure import PERCENTILES

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6675; --line: #d9dee5;
  --page: #fff; --c0: #2563c9; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #98a2b1;
  --line: #333b46; --page: #14181d; --c0: #74a7ff; --c1: #ff9f68; --c2: #69db7c; --c3: #da8ef0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p, .soft { color: var(--soft); margin: .2rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 500; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
svg .title { fill: var(--ink); font-size: 13px; font-weight: 600; }
svg .grid { stroke: var(--line); } polyline { fill: none; stroke-width: 1.8; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); }
.s3 { stroke: var(--c3); } circle { fill: var(--page); stroke-width: 1.8; }
.legend span::before { content: "— "; font-weight: 700; } .legend span { margin-right: 1rem; }
.k0::before { color: var(--c0); } .k1::before { color: var(--c1); }
.k2::before { color: var(--c2); } .k3::before { color: var(--c3); }
.bad { color: #c92a2a; font-weight: 600; } .good { color: #2b8a3e; font-weight: 600; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.cards div { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .9rem; }
.cards b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
"""


def page(result: dict[str, Any]) -> str:
    """The whole page of a result of `bench` or `simulate`."""
    title = f"{result['model']}: {result['load']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(result['url'])} · {escape(result['started'])}</p>",
        _cards(result["summary"]),
        _remarks(result),
        _predicted(result.get("predicted")),
        _rates(result.get("find_rate")),
        _charts(result),
        "<h2>Latency, ms</h2>" + _percentiles(result["summary"]),
        _groups(result["summary"]),
        _confidence(result.get("confidence", {})),
        _chaos(result.get("chaos", [])),
        "<h2>Options</h2>" + _options(result.get("options", {})),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(part for part in body if part)
        + "</body></html>\n"
    )


def _cards(summary: dict[str, Any]) -> str:
    throughput, latency = summary["throughput"], summary["latency_ms"]
    cards = {
        "output tokens/s": throughput["output_tokens_per_second"],
        "requests/s": throughput["requests_per_second"],
        "completed": summary["requests"]["completed"],
        "failed": sum(summary["errors"].values()),
        "cached input tokens": summary["tokens"]["cached"],
    }
    for name in ("ttft", "tpot"):
        if latency[name] is not None:
            cards[f"{name.upper()} p50, ms"] = latency[name]["p50"]
            cards[f"{name.upper()} p95, ms"] = latency[name]["p95"]
    if "goodput" in summary:
        cards["within the SLO, %"] = summary["goodput"]["share"] * 100
        cards["goodput, requests/s"] = summary["goodput"]["requests_per_second"]
    if summary.get("fairness") is not None:
        cards["Jain fairness"] = summary["fairness"]
    divs = (f"<div><b>{short(value)}</b>{name}</div>" for name, value in cards.items())
    return f'<div class="cards">{"".join(divs)}</div>'


def _remarks(result: dict[str, Any]) -> str:
    summary = result["summary"]
    remarks = [f"error: {kind}: {count}" for kind, count in summary["errors"].items()]
    remarks += [f"disagreement: {kind}: {n}" for kind, n in summary["disagreements"].items()]
    remarks += [f"warning: {text}" for text in result.get("warnings", [])]
    return "".join(f'<p class="bad">{escape(remark)}</p>' for remark in remarks)


def _charts(result: dict[str, Any]) -> str:
    rows, server = result.get("timeline", []), result.get("server", [])

    def course(key: str, source: Sequence[dict[str, Any]] = rows) -> list[tuple[float, float]]:
        return [(row["t"], row[key]) for row in source if key in row]

    kv = [(t, 100 * share) for t, share in course("kv", server)]
    quantiles = result.get("quantiles", {})
    curves = {
        name.upper(): [(value, i * 100 / (len(values) - 1)) for i, value in enumerate(values)]
        for name, values in quantiles.items()
        if values
    }
    rate = {"output tokens/s": course("output_tokens_per_second")}
    firsts = {"p50": course("ttft_p50"), "p95": course("ttft_p95")}
    requests = {"sent": course("sent"), "done": course("done")}
    queue = {
        "in flight (client)": course("in_flight"),
        "running (server)": course("running", server),
        "waiting (server)": course("waiting", server),
    }
    charts = [
        line_chart("Throughput", rate, "seconds", "tokens/s"),
        line_chart("Time to first token", firsts, "seconds", "ms"),
        line_chart("Requests per span", requests, "seconds", ""),
        line_chart("Queue and batch", queue, "seconds", "requests"),
        line_chart("KV cache in use", {"KV blocks": kv}, "seconds", "%"),
        *(
            line_chart(f"{name} distribution", {name: points}, "ms", "% of values")
            for name, points in curves.items()
        ),
    ]
    figures = "".join(f"<div>{chart}</div>" for chart in charts if chart)
    return f'<h2>Course of the run</h2><div class="grid2">{figures}</div>' if figures else ""


def _rates(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    probes = found["probes"]
    curves = {
        name: [(p["rate"], p[name]) for p in probes if name in p]
        for name in ("TTFT p50", "TTFT p95")
    }
    tpot = {"TPOT p50": [(p["rate"], p["TPOT p50"]) for p in probes if "TPOT p50" in p]}
    best = "none" if found["rate"] is None else f"{found['rate']:.2f} requests/s"
    charts = (
        line_chart("TTFT against rate", curves, "requests/s", "ms", dots=True),
        line_chart("TPOT against rate", tpot, "requests/s", "ms", dots=True),
    )
    figures = "".join(f"<div>{chart}</div>" for chart in charts)
    return f'<h2>Highest rate within the SLO: {best}</h2><div class="grid2">{figures}</div>'


def _percentiles(summary: dict[str, Any]) -> str:
    columns = ["mean", *(f"p{p}" for p in PERCENTILES), "max", "count"]
    rows = {**summary["latency_ms"], "send lag": summary.get("send_lag_ms")}
    cells = [
        [name.upper() if len(name) < 5 else name, *(short(figures[c]) for c in columns)]
        for name, figures in rows.items()
        if figures is not None
    ]
    return table(["", *columns], cells)


def _groups(summary: dict[str, Any]) -> str:
    groups = summary.get("groups")
    if not groups:
        return ""
    shares = summary.get("goodput", {}).get("groups", {})
    rows = []
    for name, figures in groups.items():
        ttft, tpot = figures["latency_ms"]["ttft"], figures["latency_ms"]["tpot"]
        rows.append([
            name,
            str(figures["requests"]),
            *(short(d[p]) if d else "" for d in (ttft, tpot) for p in ("p50", "p99")),
            short(figures["service_tokens_per_second"]),
            f"{shares[name]:.1%}" if name in shares else "",
        ])  # fmt: skip
    header = ["group", "requests", "TTFT p50", "p99", "TPOT p50", "p99", "tokens/s each", "in SLO"]
    return "<h2>Groups</h2>" + table(header, rows)


def _confidence(intervals: dict[str, dict[str, float]]) -> str:
    if not intervals:
        return ""
    rows = [[n, short(i["mean"]), f"± {short(i['half_width'])}"] for n, i in intervals.items()]
    return "<h2>Over repetitions</h2>" + table(["", "mean", "95 % confidence"], rows)


def _predicted(rows: Sequence[dict[str, Any]] | None) -> str:
    if not rows:
        return ""
    cells = [
        [
            f"{row['workload']}: {row['figure']}" if row.get("workload") else row["figure"],
            short(row["predicted"]),
            short(row["measured"]),
            f"{row['error_percent']:+.1f} %",
        ]
        for row in rows
    ]
    return "<h2>Predicted beside measured</h2>" + table(
        ["", "predicted", "measured", "error"], cells
    )


def _chaos(checks: Sequence[dict[str, Any]]) -> str:
    if not checks:
        return ""
    rows = [[c["name"], "passed" if c["passed"] else "FAILED", c["detail"]] for c in checks]
    return "<h2>Bad clients</h2>" + table(["check", "", ""], rows)


def _options(options: dict[str, Any]) -> str:
    return table(["", ""], [[name, str(value)] for name, value in options.items()])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as an HTML table."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
