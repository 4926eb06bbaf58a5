"""Charts as SVG text: lines over a number, nothing else. Colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 28, 36


def line_chart(
    title: str, series: Mapping[str, Points], x_label: str, y_label: str, *, dots: bool = False
) -> str:
    """One figure; empty series are left out, and a figure without points is empty text."""
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    low, high = min(xs), max(*xs, min(xs) + 1e-9)
    top = max(*ys, 1e-9) * 1.05

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="16">{escape(title)}</text>',
    ]
    for value in ticks(0.0, top):
        _, y = place(low, value)
        line = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line class="grid" {line}/>')
        parts.append(_label(short(value), _LEFT - 6, y + 4))
    for value in ticks(low, high):
        x, _ = place(value, 0)
        parts.append(_label(short(value), x, _HEIGHT - _BOTTOM + 16, "middle"))
    parts.append(_label(x_label, _WIDTH - _RIGHT, _HEIGHT - 4))
    parts.append(_label(y_label, _WIDTH - _RIGHT, 16))
    for number, (name, points) in enumerate(drawn.items()):
        parts += _curve(number, name, [place(x, y) for x, y in points], points, dots)
    return "\n".join([*parts, "</svg>", _legend(list(drawn))])


def _label(text: str, x: float, y: float, anchor: str = "end") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="tick" {place}>{escape(text)}</text>'


def _curve(
    number: int, name: str, places: Sequence[tuple[float, float]], points: Points, dots: bool
) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = [f'<polyline class="s{number}" points="{path}"/>']
    if dots:
        drawn += [
            f'<circle class="s{number}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
            f"<title>{escape(name)}: {short(a)}, {short(b)}</title></circle>"
            for (x, y), (a, b) in zip(places, points, strict=True)
        ]
    return drawn


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    items = (f'<span class="k{i}">{escape(name)}</span>' for i, name in enumerate(names))
    return f'<p class="legend">{" ".join(items)}</p>'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most so many (and one)."""
    raw = (high - low) / most
    if raw <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few characters."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1e3:,.0f}k" if abs(value) < 1e7 else f"{value / 1e6:,.0f}M"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
