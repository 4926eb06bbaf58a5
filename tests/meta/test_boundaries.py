"""What may stand where: environment access, machine paths, registry hosts, one version."""

from __future__ import annotations

import ast
import re
from importlib.metadata import version

import pytest

from tests.meta.tree import ROOT, files, name_of

ROOMS = ("app", "batching", "loadtest")
# Spelt in pieces so that this file does not contain what it forbids.
FORBIDDEN_TEXT = re.compile(
    "|".join(
        [
            r"(?<![\w./])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me/\w+)/",
            r"/o" + r"pt/(?:py" + r"pi|wh" + r"eels)",
            "py" + r"pi\.org",
            "python" + r"hosted\.org",
            "registry" + r"\.npm",
            "registry" + r"\.yarn",
            "crates" + r"\.io",
            "proxy" + r"\.golang",
            r"download" + r"\.pytorch",
        ]
    )
)


def environment_uses(source: str) -> list[int]:
    """Lines that touch the process environment."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"})
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and _names_it(node))
    ]


def _names_it(node: ast.ImportFrom) -> bool:
    return any(alias.name in {"environ", "getenv", "putenv"} for alias in node.names)


def test_only_config_reads_the_environment() -> None:
    found = {
        f"{name_of(path)}:{line}"
        for room in ROOMS
        for path in files(f"{room}/*.py")
        for line in environment_uses(path.read_text())
    }
    assert found == set()


@pytest.mark.parametrize(
    "source", ["import os\nos.environ['A']", "import os\nos.getenv('A')", "from os import environ"]
)
def test_environment_uses_are_found(source: str) -> None:
    assert environment_uses(source) != []


def test_no_machine_path_and_no_registry_host() -> None:
    found = []
    for path in files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{name_of(path)}:{number}"
            for number, line in enumerate(text.splitlines(), 1)
            if FORBIDDEN_TEXT.search(line)
        ]
    assert found == []


def test_forbidden_text_is_found() -> None:
    assert FORBIDDEN_TEXT.search("cd /wo" + "rk/main")
    assert FORBIDDEN_TEXT.search("https://py" + "pi.org/simple")
    assert not FORBIDDEN_TEXT.search("the /v1/work/ route of example.com/work/")


def test_the_version_is_the_installed_one() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert declared is not None
    assert version("slipstream") == declared[1]
