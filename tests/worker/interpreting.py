"""Makes the interpretation of Triton's kernels cheap, where there is no GPU."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest

from batching.worker import few_rows
from tests.conftest import HAS_GPU


def make_interpreting_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tiles of little models: an interpreted program costs the same whatever its size."""
    usual = few_rows.constants

    def large(*args: int) -> dict[str, Any]:
        given = usual(*args)
        return {**given, "TILE": 128, "PIECE": 64, "PARTS": 4 if given["DOTS"] else 8}

    if not HAS_GPU:
        monkeypatch.setattr(few_rows, "constants", large)


def remember_builtins() -> None:
    """The interpreter looks for them whenever a kernel calls a function: a third of its time."""
    from triton import language
    from triton.runtime import interpreter

    @cache
    def builtins_of(package: Any) -> list[tuple[str, Any]]:
        found = inspect.getmembers(package)
        return [(name, member) for name, member in found if language.core.is_builtin(member)]

    def patch(package: Any, *where: Any) -> None:
        for name, member in builtins_of(package):
            if getattr(package, name) is member:  # else a caller has replaced it
                interpreter._patch_attr(package, name, member, *where)

    interpreter._patch_builtin = patch
