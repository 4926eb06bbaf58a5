"""Makes the interpretation of kernels cheap, where there is no GPU."""

from __future__ import annotations

import inspect
from functools import cache
from importlib.util import find_spec
from typing import Any

from tests.conftest import HAS_GPU


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


if find_spec("triton") and not HAS_GPU:
    remember_builtins()
