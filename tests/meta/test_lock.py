"""The lock pins every direct dependency, inside the range that the project declares."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.meta.tree import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [*PROJECT["dependencies"], *EXTRAS["dev"]]
LOCK = {
    canonicalize_name(name): version
    for name, _, version in (
        line.partition("==")
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if not line.startswith("#")
    )
}


@pytest.mark.parametrize("declared", DECLARED)
def test_dependencies_are_pinned_within_their_range(declared: str) -> None:
    requirement = Requirement(declared)
    assert LOCK[canonicalize_name(requirement.name)] in requirement.specifier


def test_all_extras_are_tested() -> None:
    assert set(EXTRAS["otel"]) <= set(EXTRAS["dev"])


def test_pins_name_no_local_build() -> None:
    assert [name for name, version in LOCK.items() if not version or "+" in version] == []
