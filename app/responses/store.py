"""Responses that may be asked for again or continued, in SQLite: in memory or in a file."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")

MAX_AGE_SECONDS = 30 * 24 * 3600  # as OpenAI keeps them
MAX_BYTES = 256 << 20  # of all together: in memory by default

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, bytes INTEGER NOT NULL,
    response BLOB NOT NULL, input BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS by_age ON responses (created);
"""


class ResponseStoreError(ValueError):
    """The file cannot be used; the message says why."""


class Stored(NamedTuple):
    """A response, and the list of all items that it was generated from; both as JSON."""

    response: bytes
    input: bytes

    @property
    def size(self) -> int:
        return len(self.response) + len(self.input)


class ResponseStore:
    """Bounded in number, age and bytes: the oldest are forgotten. Owners see only their own.

    Work is done off the event loop, one call at a time.
    """

    def __init__(self, path: str, max_count: int) -> None:
        """`path` is a file, or empty for memory. Raises `ResponseStoreError`."""
        self._lock = threading.Lock()
        self._max_count = max_count
        try:
            self._database = sqlite3.connect(path or ":memory:", check_same_thread=False)
            if path:
                self._database.execute("PRAGMA journal_mode=WAL")
                self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.executescript(_SCHEMA)
            self._count, self._bytes = self._database.execute(
                "SELECT count(*), coalesce(sum(bytes), 0) FROM responses"
            ).fetchone()
        except sqlite3.Error as error:
            raise ResponseStoreError(f"cannot keep responses in {path}: {error}") from error

    async def put(self, id: str, owner: str, stored: Stored, now: float) -> None:
        """Keep a response. `now` is wall-clock time."""
        row = (id, owner, now, stored.size, *stored)
        await self._run(lambda: self._put(row, now))

    async def get(self, id: str, owner: str, now: float) -> Stored | None:
        """The response, unless there is none, it is too old or somebody else's."""
        row = await self._run(
            lambda: self._database.execute(
                "SELECT response, input FROM responses WHERE id = ? AND owner = ? AND created > ?",
                (id, owner, now - MAX_AGE_SECONDS),
            ).fetchone()
        )
        return None if row is None else Stored(*row)

    async def delete(self, id: str, owner: str) -> bool:
        """Whether there was one to delete."""
        return await self._run(lambda: self._delete(id, owner))

    def close(self) -> None:
        self._database.close()

    def _put(self, row: tuple[Any, ...], now: float) -> None:
        with self._database:
            self._drop("WHERE created <= ?", now - MAX_AGE_SECONDS)
            self._database.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?)", row)
            self._count += 1
            self._bytes += row[3]
            while self._count > self._max_count or self._bytes > MAX_BYTES:
                self._drop("WHERE rowid = (SELECT rowid FROM responses ORDER BY created LIMIT 1)")

    def _delete(self, id: str, owner: str) -> bool:
        with self._database:
            return self._drop("WHERE id = ? AND owner = ?", id, owner) > 0

    def _drop(self, where: str, *values: object) -> int:
        """Delete rows and count them out. Returns how many there were."""
        sizes = self._database.execute(
            f"DELETE FROM responses {where} RETURNING bytes", values
        ).fetchall()
        self._count -= len(sizes)
        self._bytes -= sum(size for (size,) in sizes)
        return len(sizes)

    async def _run(self, work: Callable[[], Result]) -> Result:
        def locked() -> Result:
            with self._lock:
                return work()

        return await asyncio.to_thread(locked)
