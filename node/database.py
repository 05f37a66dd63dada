"""What a node remembers across restarts in SQLite: small, and worth nothing if it is lost."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Database:
    """Without the disk the node goes on: it asks for what it would have remembered. A damaged file is begun anew."""

    def __init__(self, path: Path, schema: str) -> None:
        self._name = path.name
        try:
            self._connection = _open(path, schema)
        except sqlite3.DatabaseError as error:
            log.warning("%s is damaged (%s): starting without what it held", path, error)
            for name in (path.name, path.name + "-wal", path.name + "-shm"):
                path.with_name(name).unlink(missing_ok=True)
            self._connection = _open(path, schema)

    def close(self) -> None:
        self._connection.close()

    def run(self, statement: str, *rows: Iterable[object]) -> list[Any]:
        """The statement once for each row of parameters; all that it finds."""
        found: list[Any] = []
        try:
            for row in rows:
                found += self._connection.execute(statement, tuple(row)).fetchall()
        except sqlite3.Error as error:
            log.warning("%s: %s", self._name, error)
        return found


def _open(path: Path, schema: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; {schema}")
    return connection
