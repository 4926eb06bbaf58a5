"""Numbers in words."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`2.4 s`, `182 ms`, `0.3 ms`."""
    if seconds >= 9.95:
        return f"{seconds:,.0f} s"
    if seconds >= 0.9995:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.00995 else f"{seconds * 1e3:.1f} ms"


def amount(count: float, noun: str) -> str:
    """`1 token`, `1,024 tokens`."""
    return f"{count:,.0f} {noun}" if count == 1 else f"{count:,.0f} {noun}s"
