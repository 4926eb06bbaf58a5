"""`slipstream compare A.json B.json`: what changed between two results, and whether it is worse."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from config.flags import OneLineParser
from loadtest.figures import FIGURES, figures
from loadtest.flags import natural


def main(arguments: Sequence[str]) -> int:
    """Returns 0, 1 if a figure of B is worse beyond the tolerance, 2 for wrong usage or files."""
    parser = OneLineParser(prog="slipstream compare", description=__doc__)
    parser.add_argument("a", type=Path, metavar="A.json", help="a result: before")
    parser.add_argument("b", type=Path, metavar="B.json", help="after")
    parser.add_argument(
        "--tolerance",
        type=natural(float),
        default=5.0,
        help="per cent that count as equal (default 5)",
    )
    options = parser.parse_args(arguments)
    try:
        before, after = load(options.a), load(options.b)
    except (OSError, ValueError) as error:
        print(f"slipstream compare: error: {error}", file=sys.stderr)
        return 2
    rows = compare(before, after, options.tolerance)
    print(render(rows))
    if not rows:
        print("slipstream compare: error: the results share no figure", file=sys.stderr)
        return 2
    return int(any(row["verdict"] == "worse" for row in rows))


def load(path: Path) -> dict[str, Any]:
    """A result file. Raises `OSError` or `ValueError`."""
    try:
        result: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is no result: {error}") from error
    if not isinstance(result.get("summary"), dict):
        raise ValueError(f"{path} is no result: it has no summary")
    return result


def compare(
    before: dict[str, Any], after: dict[str, Any], tolerance: float
) -> list[dict[str, Any]]:
    """One row for each figure both have. With repetitions on both sides, a change counts only if
    the confidence intervals do not touch. Errors are a figure: any more of them are worse."""
    old, new = figures(before["summary"]), figures(after["summary"])
    sure = before.get("confidence", {}), after.get("confidence", {})
    rows = []
    for name, (_, unit, more_is_better) in FIGURES.items():
        if name not in old or name not in new:
            continue
        a, b = old[name], new[name]
        if all(name in side for side in sure):
            a, b = sure[0][name]["mean"], sure[1][name]["mean"]
        change = (b / a - 1) * 100 if a else 0.0
        verdict = "same"
        if abs(change) > tolerance and not _touch(sure[0].get(name), sure[1].get(name)):
            verdict = "better" if (change > 0) == more_is_better else "worse"
        rows.append(_row(name, unit, a, b, change, verdict))
    failed = [float(sum(side["summary"].get("errors", {}).values())) for side in (before, after)]
    if rows and any(failed):
        verdict = "worse" if failed[1] > failed[0] else "same"
        change = (failed[1] / failed[0] - 1) * 100 if failed[0] else 100.0
        rows.append(_row("errors", "", failed[0], failed[1], change, verdict))
    return rows


def _row(
    name: str, unit: str, before: float, after: float, change: float, verdict: str
) -> dict[str, Any]:
    return {
        "figure": name,
        "unit": unit,
        "before": before,
        "after": after,
        "change_percent": change,
        "verdict": verdict,
    }


def _touch(a: dict[str, float] | None, b: dict[str, float] | None) -> bool:
    if a is None or b is None:
        return False
    return abs(a["mean"] - b["mean"]) <= a["half_width"] + b["half_width"]


def render(rows: Sequence[dict[str, Any]]) -> str:
    """A table for the terminal."""
    lines = [f"{'':<22}{'A':>12}{'B':>12}{'change':>10}"]
    for row in rows:
        name = f"{row['figure']}, {row['unit']}" if row["unit"] else row["figure"]
        verdict = "" if row["verdict"] == "same" else f"  {row['verdict']}"
        lines.append(
            f"{name:<22}{row['before']:>12.2f}{row['after']:>12.2f}"
            f"{row['change_percent']:>+9.1f}%{verdict}"
        )
    return "\n".join(lines)
