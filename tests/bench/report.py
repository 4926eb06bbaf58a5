"""Medians over rounds, ratios between servers and shares of the machine's limits, as Markdown.

Ratios are of medians: ours / the other's. For tokens per second more is better, for times less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

from tests.bench.machine import Machine, ModelSize, output_rate, token_seconds
from tests.bench.workloads import Case

_NONE = "–"
_GAPS = {
    "gap_ratio": "worst gap ÷ median gap",
    "worst_gap_ms": "worst gap, ms",
    "median_gap_ms": "median gap, ms",
    "median_gap_before_ms": "median gap before the prompt, ms",
    "long_ttft_ms": "its own TTFT, ms",
}


def values(result: dict[str, Any], server: str, case: str, figure: str) -> list[float]:
    """One figure of one server and case in every round that has it."""
    runs = (run for run in result["runs"] if run["server"] == server)
    return [run["cases"][case][figure] for run in runs if figure in run["cases"].get(case, {})]


def middle(found: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return median(found) if found else None


def limit_share(result: dict[str, Any], server: str, case: Case) -> float | None:
    """How near a server's median is to the least time, or the most tokens/s, that is possible."""
    size = ModelSize(**result["models"][case.model]["size"])
    limits = typical_machine(result)
    if case.kind == "long":
        return None
    if case.concurrency == 1:
        tpot = middle(values(result, server, case.key, "tpot_ms"))
        return None if tpot is None else token_seconds(size, limits) * 1e3 / tpot
    rate = middle(values(result, server, case.key, "output_rate"))
    best = output_rate(
        size,
        limits,
        prompt_tokens=case.computed_prompt_tokens,
        output_tokens=case.requests * case.shape.output_tokens,
        sequences=case.concurrency,
    )
    return None if rate is None else rate / best


def typical_machine(result: dict[str, Any]) -> Machine:
    """The median over rounds of each limit."""
    names = ("bandwidth", "bf16", "float32", "idle")
    return Machine(**{name: median(m[name] for m in result["machine"]) for name in names})


def markdown(result: dict[str, Any], cases: Sequence[Case]) -> str:
    """Both tables, what they were measured on, and what was left out and why."""
    servers = list(dict.fromkeys(run["server"] for run in result["runs"]))
    limits = typical_machine(result)
    lines = [
        f"{result['cpu']}, {result['cores']} cores; {result['started']}; commit "
        f"{result['commit']}; medians of {result['rounds']} rounds. Memory read "
        f"{limits.bandwidth / 1e9:.1f} GB/s, bf16 {limits.bf16 / 1e12:.2f} TFLOP/s, "
        f"{limits.idle:.0%} of the cores idle before the servers.",
        "",
        *_speeds(result, cases, servers),
        "",
        *_others(result, cases, servers),
    ]
    if result["notes"]:
        lines += ["", *(f"- {note}" for note in result["notes"])]
    return "\n".join(lines) + "\n"


def _speeds(result: dict[str, Any], cases: Sequence[Case], servers: list[str]) -> Iterable[str]:
    ours = servers[0] if servers else ""
    yield (
        f"| workload | server | output tok/s (min–max) | TTFT p50, ms | TPOT p50, ms "
        f"| tok/s, {ours} ÷ it | TPOT, {ours} ÷ it | of the limit |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for case in cases:
        for server in servers:
            rates = values(result, server, case.key, "output_rate")
            if not rates:
                continue
            share = limit_share(result, server, case)
            row = [
                case.title,
                server,
                f"{median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f})",
                _shown(middle(values(result, server, case.key, "ttft_ms")), "{:.0f}"),
                _shown(middle(values(result, server, case.key, "tpot_ms")), "{:.1f}"),
                _ratio(result, ours, server, case.key, "output_rate"),
                _ratio(result, ours, server, case.key, "tpot_ms"),
                _shown(share, "{:.0%}"),
            ]
            yield f"| {' | '.join(row)} |"


def _others(result: dict[str, Any], cases: Sequence[Case], servers: list[str]) -> Iterable[str]:
    """Figures that are not a speed, a column a server."""
    yield f"| | {' | '.join(servers)} |"
    yield "|---" * (len(servers) + 1) + "|"
    rows: list[tuple[str, Callable[[str], float | None], str]] = []
    for model in result["models"]:
        start, peak = (
            partial(_process, result, model, key) for key in ("start_seconds", "peak_gb")
        )
        rows.append((f"{model}: start to first token, s", start, "{:.1f}"))
        rows.append((f"{model}: peak memory, GB", peak, "{:.1f}"))
    for case in cases:
        if case.kind == "busy":
            rows.append((f"{case.title}: tok/s lost", partial(busy_loss, result), "{:.0%}"))
        if case.kind == "long":
            for key, text in _GAPS.items():
                gap = partial(_middle_of, result, case.key, key)
                rows.append((f"{case.title}: {text}", gap, "{:.1f}"))
    for title, figure, form in rows:
        cells = [_shown(figure(server), form) for server in servers]
        if set(cells) != {_NONE}:
            yield f"| {title} | {' | '.join(cells)} |"


def _process(result: dict[str, Any], model: str, key: str, server: str) -> float | None:
    runs = [r for r in result["runs"] if (r["server"], r["model"]) == (server, model)]
    return middle([run[key] for run in runs])


def _middle_of(result: dict[str, Any], case: str, figure: str, server: str) -> float | None:
    return middle(values(result, server, case, figure))


def busy_loss(result: dict[str, Any], server: str) -> float | None:
    """The share of output tokens/s that a server loses to the busy core."""
    free = middle(values(result, server, "M-16", "output_rate"))
    busy = middle(values(result, server, "M-busy", "output_rate"))
    return None if free is None or busy is None else 1 - busy / free


def _ratio(result: dict[str, Any], ours: str, server: str, case: str, figure: str) -> str:
    if server == ours:
        return _NONE
    mine, its = (middle(values(result, name, case, figure)) for name in (ours, server))
    return _NONE if mine is None or not its else f"{mine / its:.2f}"


def _shown(value: float | None, form: str) -> str:
    return _NONE if value is None else form.format(value)
