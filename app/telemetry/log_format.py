"""Log lines for people, or one JSON object each for machines."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

_PLAIN = re.compile(r"[!-~]+")


class Facts:
    """A log message that is made of named values. As text: `name=value …`."""

    def __init__(self, message: str, values: Mapping[str, Any]) -> None:
        self.message = message
        self.values = values

    def __str__(self) -> str:
        named = (f"{name}={_plain(value)}" for name, value in self.values.items())
        return " ".join([self.message, *named])


def _plain(value: Any) -> str:
    """One word, whatever a client had put in it."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else msgspec.json.encode(text).decode()


class JsonFormatter(logging.Formatter):
    """`time`, `level` and `message`, then the values of `Facts`, or a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        facts = record.msg if isinstance(record.msg, Facts) else None
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage() if facts is None else facts.message,
        }
        if facts is not None:
            line |= facts.values
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure_logging(level: str, style: str) -> None:
    """Log to stderr, as "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
        )
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for chatty in ("httpx", "huggingface_hub", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
