"""Small tables that a node keeps across restarts in SQLite, and whose loss costs little.

If the file cannot be opened, the node continues with a database in memory until it stops. A damaged file is replaced by
an empty one, even if the damage is noticed only at a later statement.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Database:
    def __init__(self, path: Path, schema: str) -> None:
        self._path, self._schema = path, schema
        try:
            self._connection = _open(path, schema)
        except sqlite3.DatabaseError as error:
            self._connection = self._replace(error) if _is_damage(error) else self._in_memory(error)

    def close(self) -> None:
        self._connection.close()

    def run(self, statement: str, *rows: Iterable[object]) -> list[Any]:
        """Run the statement once for each row of parameters, in one transaction. Returns all rows that it selects."""
        selected: list[Any] = []
        try:
            if len(rows) > 1:
                self._connection.execute("BEGIN")
            with self._connection:  # commits, or rolls back after an error
                for row in rows:
                    selected += self._connection.execute(statement, tuple(row)).fetchall()
        except sqlite3.Error as error:
            if _is_damage(error):
                self._connection.close()
                self._connection = self._replace(error)
                return []
            log.warning("%s: %s: new entries may be lost when the node stops", self._path.name, error)
        return selected

    def _replace(self, error: sqlite3.Error) -> sqlite3.Connection:
        log.warning("%s is damaged (%s): starting with an empty one", self._path, error)
        try:
            for end in ("", "-wal", "-shm"):
                self._path.with_name(self._path.name + end).unlink(missing_ok=True)
            return _open(self._path, self._schema)
        except (OSError, sqlite3.Error) as again:
            return self._in_memory(again)

    def _in_memory(self, error: Exception) -> sqlite3.Connection:
        log.warning("%s cannot be used (%s): new entries are kept only until the node stops", self._path, error)
        return _open(":memory:", self._schema)


def _open(path: Path | str, schema: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; {schema}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _is_damage(error: sqlite3.Error) -> bool:
    return error.sqlite_errorcode & 0xFF in _DAMAGED
