"""What a worker warns of while it starts, for the front end to tell: few read logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 300  # characters: a compiler can say much


@contextmanager
def noted_warnings() -> Iterator[list[str]]:
    """Gives a list that has the worker's warnings, one line each, when the context ends."""
    noted: list[str] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            noted.append(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")

    handler, logger = Noting(logging.WARNING), logging.getLogger("batching.worker")
    logger.addHandler(handler)
    try:
        yield noted
    finally:
        logger.removeHandler(handler)
