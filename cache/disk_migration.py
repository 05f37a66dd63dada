"""Making the tables of the disk store's index, and moving those of older versions over."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import msgspec

from cache.runs import RUN_BLOCKS
from protocol.errors import UNDECODABLE, BadInputError
from protocol.records import Record

logger = logging.getLogger(__name__)

SCHEMA = 4
OLDEST_SCHEMA = 2
"""The oldest version that is read."""
_CREATE_PIECE = """
CREATE TABLE piece (
    digest TEXT NOT NULL, block INTEGER NOT NULL,
    k INTEGER NOT NULL, m INTEGER NOT NULL, shard INTEGER NOT NULL,
    sha256 BLOB NOT NULL, record BLOB NOT NULL, maker TEXT, proof BLOB,
    PRIMARY KEY (digest, block, k, m, shard)
) STRICT, WITHOUT ROWID
"""
_CREATE_RUN = """
CREATE TABLE run (
    digest TEXT NOT NULL, size INTEGER NOT NULL, number INTEGER NOT NULL, kept_for TEXT NOT NULL,
    used INTEGER NOT NULL, pieces BLOB NOT NULL,
    PRIMARY KEY (digest, size, number, kept_for)
) STRICT, WITHOUT ROWID
"""
_ADDED_IN_3 = {"kept_for": "TEXT", "maker": "TEXT", "proof": "BLOB"}


def migrate(database: sqlite3.Connection, path: Path) -> None:
    """Make the tables, or change those of an older version, in one transaction. Raises sqlite3.Error, and BadInputError
    if another version made them."""
    version = database.execute("PRAGMA user_version").fetchone()[0]
    tables = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    new = version == 0 and tables == 0
    if version == SCHEMA:
        return
    if not new and not OLDEST_SCHEMA <= version <= SCHEMA:
        raise BadInputError(
            f"{path} has schema version {version}, this program knows {OLDEST_SCHEMA} to {SCHEMA}: use the program "
            f"that wrote it, or remove the folder {path.parent}, which is only a cache"
        )
    with database:
        database.execute("BEGIN IMMEDIATE")
        database.execute(_CREATE_RUN)
        if new:
            database.execute(_CREATE_PIECE)
        else:
            _to_version_3(database)
            _to_version_4(database)
            count = database.execute("SELECT count(*) FROM run").fetchone()[0]
            logger.warning("%s: moved from version %d to %d, with %d runs of blocks", path, version, SCHEMA, count)
        database.execute(f"PRAGMA user_version = {SCHEMA}")


def _to_version_3(database: sqlite3.Connection) -> None:
    present = {row[1] for row in database.execute("PRAGMA table_info(piece)")}
    for name in [column for column in _ADDED_IN_3 if column not in present]:
        database.execute(f"ALTER TABLE piece ADD COLUMN {name} {_ADDED_IN_3[name]}")
    if "maker" not in present:
        # Nobody answers for these shards: a keeper that passed on a wrong one would be blamed as its maker.
        database.execute("DELETE FROM piece WHERE k > 0")


def _to_version_4(database: sqlite3.Connection) -> None:
    """Version 3 had the last use and the askers in the row of each piece, and no runs. Rows of pieces that are not
    readable get no run, so that the pieces are not held."""
    runs: dict[tuple[str, int, int, str], tuple[int, dict[tuple[int, int, int], int]]] = {}
    query = "SELECT digest, block, k, m, shard, used, kept_for, record FROM piece"
    for digest, block, k, m, shard, used, kept_for, raw in database.execute(query):
        try:
            size = msgspec.msgpack.decode(raw, type=Record).size
        except UNDECODABLE as error:
            logger.warning("index: record in the row of %s #%d is not readable: %s", digest, block, error)
            continue
        number, bit = divmod(block, RUN_BLOCKS)
        last, held = runs.get((digest, size, number, kept_for or ""), (0, {}))
        held[k, m, shard] = held.get((k, m, shard), 0) | 1 << bit
        runs[digest, size, number, kept_for or ""] = max(last, used), held
    rows = (
        (*key, used, msgspec.msgpack.encode([(*shard, bits) for shard, bits in held.items()]))
        for key, (used, held) in runs.items()
    )
    database.executemany("INSERT INTO run VALUES (?, ?, ?, ?, ?, ?)", rows)
    for column in ("used", "kept_for"):
        database.execute(f"ALTER TABLE piece DROP COLUMN {column}")
