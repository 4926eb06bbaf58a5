"""Files stay within 400 lines and functions within 60, so that each can be read at a sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.meta.tree import files, name_of

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
SOURCE = files("*.py", "*.cpp", "*.h", "*.cu", "*.js", "*.css", "app/page/*.html")


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """(name, lines) of each function that is too long, decorators not counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.name, lines


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCE}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    found = [
        f"{name_of(path)}: {name} has {lines} lines"
        for path in SOURCE
        if path.suffix == ".py"
        for name, lines in long_functions(path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(("body", "expected"), [(59, []), (60, [("f", 61)])])
def test_the_check_counts_lines(body: int, expected: list[tuple[str, int]]) -> None:
    source = "def f():\n" + "    pass\n" * body
    assert list(long_functions(source)) == expected
