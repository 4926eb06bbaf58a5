"""Shorthands of regular expressions are ASCII, in and out of brackets."""

from __future__ import annotations

import pytest

from app.structured.expressions import translate


@pytest.mark.parametrize(
    ("expression", "translated"),
    [
        (r"^\d{3}$", "^[0-9]{3}$"),
        (r"\D\w\W", "[^0-9][0-9A-Za-z_][^0-9A-Za-z_]"),
        (r"[\d.]\d", "[0-9.][0-9]"),
        (r"[^\w-]+", "[^0-9A-Za-z_-]+"),
        (r"[]\d]\d", r"[\]0-9][0-9]"),
        (r"[^]\d]\w", r"[^\]0-9][0-9A-Za-z_]"),
        (r"[\D\]\d]", r"[\D\]0-9]"),
        (r"[a\]\w[]\d", r"[a\]0-9A-Za-z_\[][0-9]"),
        (r"\\d\[\d\]", r"\\d\[[0-9]\]"),
        (r"a\Z|\s\/é", r"a\z|\s\/é"),
    ],
)
def test_shorthands(expression: str, translated: str) -> None:
    assert translate(expression) == translated
