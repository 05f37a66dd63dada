"""The disk store's index: one SQLite row for each piece whose bytes are on the disk. See docs/FORMATS.md, "Disk store".

The store works from memory; the index outlives the process. It is read once and written in batches.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cache.pieces import check_piece
from cache.store import READ_HERE, Askers
from protocol.errors import UNDECODABLE, BadInputError
from protocol.ids import BlockId, Digest, PeerId, Piece, Shard
from protocol.records import Record
from protocol.shard_proofs import ShardProof

logger = logging.getLogger(__name__)

SCHEMA = 3
OLDEST_SCHEMA = 2
"""The oldest version that is read: its table gets the columns that it lacks, and keeps its rows."""
PRAGMAS = ["journal_mode = WAL", "synchronous = NORMAL"]
_CREATE = """
CREATE TABLE piece (
    digest TEXT NOT NULL, block INTEGER NOT NULL,
    k INTEGER NOT NULL, m INTEGER NOT NULL, shard INTEGER NOT NULL,
    sha256 BLOB NOT NULL, record BLOB NOT NULL, used INTEGER NOT NULL,
    PRIMARY KEY (digest, block, k, m, shard)
) STRICT, WITHOUT ROWID
"""
_ADDED = {"kept_for": "TEXT", "maker": "TEXT", "proof": "BLOB"}
"""Columns that version 2 did not have; NULL in its rows."""
_COLUMNS = ", ".join(("digest, block, k, m, shard, sha256, record, used", *_ADDED))
_WHERE_KEY = "digest = ? AND block = ? AND k = ? AND m = ? AND shard = ?"

Key = tuple[str, int, int, int, int]
"""digest, block, k, m, shard; the last three are 0 for a whole block."""

Row = tuple[str, int, int, int, int, bytes, bytes, int, str | None, str | None, bytes | None]
"""A key, the sha256 of the piece's bytes, the record in msgpack, its last reference, the members that it is kept for as
peer ids with spaces between them (`Stored`), and of a shard the maker and its signature."""


@dataclass(frozen=True, slots=True)
class Stored:
    """`used` orders pieces by their last reference, in Unix milliseconds. `kept_for`: see `BlockStore.put`."""

    piece: Piece
    sha256: bytes
    record: Record
    used: int
    kept_for: Askers = READ_HERE
    proof: ShardProof | None = None


def key_of(piece: Piece) -> Key:
    digest, shard = str(piece.block.digest), piece.shard
    k, m, index = (0, 0, 0) if shard is None else (shard.k, shard.m, shard.index)
    return digest, piece.block.index, k, m, index


def parse_row(row: Row) -> Stored:
    """Raises BadInputError on a row that no version of this program wrote."""
    digest, block, k, m, index, sha256, raw, used, kept_for, maker, signature = row
    try:
        record = msgspec.msgpack.decode(raw, type=Record)
    except UNDECODABLE as error:
        raise BadInputError(f"record in the row of {digest} #{block} is not readable: {error}") from error
    piece = Piece(BlockId(Digest.parse(digest), block), Shard(k, m, index) if k else None)
    check_piece(piece, record)
    askers = tuple(PeerId(peer) for peer in dict.fromkeys((kept_for or "").split()))
    proof = ShardProof(PeerId(maker), sha256, signature) if maker is not None and signature is not None else None
    return Stored(piece, sha256, record, used, askers, proof)


def _joined(askers: Askers) -> str | None:
    return " ".join(askers) or None


def _row(stored: Stored) -> Row:
    raw, proof = msgspec.msgpack.encode(stored.record), stored.proof
    signed = (proof.maker, proof.signature) if proof is not None else (None, None)
    return *key_of(stored.piece), stored.sha256, raw, stored.used, _joined(stored.kept_for), *signed


class DiskIndex:
    """An open index file. One thread at a time."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def rows(self) -> tuple[list[Stored], list[Key]]:
        """All rows, the most recently used first, and the keys of those that are malformed. Raises sqlite3.Error."""
        good, bad = [], []
        for row in self._database.execute(f"SELECT {_COLUMNS} FROM piece ORDER BY used DESC"):
            try:
                good.append(parse_row(row))
            except BadInputError as error:
                logger.warning("index: %s", error)
                bad.append(row[:5])
        return good, bad

    def apply(self, removed: Iterable[Key], added: Iterable[Stored], referenced: Iterable[Stored]) -> None:
        """One transaction: of `referenced` pieces, `used` and `kept_for` are written. Raises sqlite3.Error if none of
        it was done."""
        with self._database:
            self._database.execute("BEGIN")
            self._database.executemany(f"DELETE FROM piece WHERE {_WHERE_KEY}", removed)
            self._database.executemany(
                f"UPDATE piece SET used = ?, kept_for = ? WHERE {_WHERE_KEY}",
                ((row.used, _joined(row.kept_for), *key_of(row.piece)) for row in referenced),
            )
            values = ", ".join("?" * len(_COLUMNS.split(", ")))
            self._database.executemany(f"INSERT OR REPLACE INTO piece ({_COLUMNS}) VALUES ({values})", map(_row, added))

    def close(self) -> None:
        self._database.close()


def open_index(path: Path) -> DiskIndex:
    """Open or make the index. An index that SQLite finds damaged is moved aside, since it only describes a cache.
    Raises sqlite3.OperationalError if the disk fails, BadInputError if another version of this program made it."""
    try:
        return _open(path)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        aside = path.with_suffix(".corrupt")
        logger.warning("%s is damaged (%s): moved to %s, the cache starts empty", path, error, aside)
        path.replace(aside)
        for leftover in (f"{path}-wal", f"{path}-shm"):
            Path(leftover).unlink(missing_ok=True)
        return _open(path)


def _open(path: Path) -> DiskIndex:
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        _migrate(database, path)
        for pragma in PRAGMAS:
            database.execute(f"PRAGMA {pragma}")
        problem = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
    except BaseException:
        database.close()
        raise
    return DiskIndex(database)


def _migrate(database: sqlite3.Connection, path: Path) -> None:
    """Make the table, or add the columns that an older version did not have."""
    version = database.execute("PRAGMA user_version").fetchone()[0]
    tables = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    new = version == 0 and tables == 0
    if not new and not OLDEST_SCHEMA <= version <= SCHEMA:
        raise BadInputError(
            f"{path} has schema version {version}, this program knows {OLDEST_SCHEMA} to {SCHEMA}: use the program "
            f"that wrote it, or remove the folder {path.parent}, which is only a cache"
        )
    present = {row[1] for row in database.execute("PRAGMA table_info(piece)")}
    if version == SCHEMA and present.issuperset(_ADDED):
        return
    with database:
        database.execute("BEGIN IMMEDIATE")
        if new:
            database.execute(_CREATE)
        for name in [column for column in _ADDED if column not in present]:
            database.execute(f"ALTER TABLE piece ADD COLUMN {name} {_ADDED[name]}")
        if not new and "maker" not in present:
            # Nobody answers for these shards: a keeper that passed on a wrong one would be blamed as its maker.
            database.execute("DELETE FROM piece WHERE k > 0")
        database.execute(f"PRAGMA user_version = {SCHEMA}")
