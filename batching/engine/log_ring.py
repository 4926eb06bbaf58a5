"""The event log on disk: a ring of files that never grows beyond its size, whoever crashes.

FILE is being written; FILE.1, FILE.2, … are older, and the oldest is deleted. An engine that starts
leaves what it finds, so the decisions that led to a crash stay until newer ones need the room.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

logger = logging.getLogger(__name__)

_PIECES = 8  # of a ring whose engines live long, and whose first lines are not large
_MOST_PIECES = 99  # of one whose engines keep dying: file names have two digits


class LogRing:
    """Writes lines to the ring at `path`, of at most `max_bytes`.

    Each piece must be readable by itself: `write` says when one begins, and the line it is given
    next must have all that went before. Only a first line of more than the ring's size exceeds it.
    Nothing is raised: what cannot be written must not take the engine down, so recording ends.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._file: BinaryIO | None = None
        self._first = True  # the next line is a piece's first
        self._room = 0  # of the piece, after its first line
        self._begin()

    def write(self, line: bytes) -> bool:
        """Append a line. Returns whether it was a piece's last."""
        if self._file is None:
            return False
        try:
            self._file.write(line)
            self._file.flush()  # it must be there after a crash
            if self._first:
                self._first = False
                self._room = self._max_bytes // _PIECES
                self._prune(self._max_bytes - len(line) - self._room)
                return False
        except OSError as error:
            self._end(error)
            return False
        self._room -= len(line)
        if self._room > 0:
            return False
        self._begin()
        return self._file is not None

    def _begin(self) -> None:
        """Move all pieces on by one and open another, for its owner only: it holds prompts."""
        try:
            if self._file is not None:
                self._file.close()
            for age, piece in reversed(list(enumerate(ring(self._path), start=1))):
                if age > _MOST_PIECES:
                    piece.unlink()
                else:
                    piece.rename(numbered(self._path, age))
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self._file = open(descriptor, "wb")  # noqa: SIM115
            self._first = True
        except OSError as error:
            self._end(error)

    def _prune(self, room: int) -> None:
        """Delete the oldest pieces until the rest, without the present one, fits in `room`."""
        for piece in ring(self._path)[1:]:
            with suppress(FileNotFoundError):  # somebody deleted it meanwhile
                status = piece.stat()
                if not S_ISREG(status.st_mode):
                    continue
                room -= status.st_size
                if room < 0:
                    piece.unlink()

    def _end(self, error: OSError) -> None:
        logger.error("the event log ends here: %s", error)
        self._file = None


def numbered(path: Path, age: int) -> Path:
    """The ring's file that is `age` pieces older than the newest."""
    return path if age == 0 else path.with_name(f"{path.name}.{age}")


def ring(path: Path) -> list[Path]:
    """The files of the ring at `path` that are there, newest first."""
    name = re.compile(re.escape(path.name) + r"(?:\.([1-9]\d?))?")
    found = {}
    for file in path.absolute().parent.iterdir():
        if match := name.fullmatch(file.name):
            found[int(match[1] or 0)] = file
    return [found[age] for age in sorted(found)]
