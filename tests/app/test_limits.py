"""The limit of open files, which is one of connections."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from app.server import raise_open_files_limit


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_low_soft_limit_of_open_files_is_raised(limits: tuple[int, int]) -> None:
    _, hard = limits
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    raise_open_files_limit()
    raised, kept = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 256 < raised <= 65536
    assert kept == hard
