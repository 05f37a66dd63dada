"""The disk store's index in SQLite: a row for each run, and one for each piece. See docs/FORMATS.md, "Disk store".

Rows of runs are read once, when the store is opened, and are in memory from then on. Rows of pieces are read with the
bytes of the piece. All is written in batches.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cache.disk_migration import migrate
from cache.pieces import MAX_SHARDS, check_piece
from cache.runs import RUN_BLOCKS
from cache.store import READ_HERE, Askers
from protocol.errors import UNDECODABLE, BadInputError
from protocol.ids import BlockId, Digest, ObjectRef, PeerId, Piece, Shard
from protocol.records import Record
from protocol.shard_proofs import ShardProof

logger = logging.getLogger(__name__)

PRAGMAS = ["journal_mode = WAL", "synchronous = NORMAL"]
_COLUMNS = "digest, block, k, m, shard, sha256, record, maker, proof"
_WHERE_KEY = "digest = ? AND block = ? AND k = ? AND m = ? AND shard = ?"
_RUN_COLUMNS = "digest, size, number, kept_for, used, pieces"
_WHERE_RUN = "digest = ? AND size = ? AND number = ? AND kept_for = ?"

_BITS = msgspec.msgpack.Decoder(list[tuple[int, int, int, int]])

Key = tuple[str, int, int, int, int]
"""digest, block, k, m, shard; the last three are 0 for a whole block."""

Row = tuple[str, int, int, int, int, bytes, bytes, str | None, bytes | None]
"""A key, the sha256 of the piece's bytes, the record in msgpack, and of a shard the maker and its signature."""

RunKey = tuple[str, int, int, str]
"""digest, size of the object, number of the range, and whom it is kept for."""


@dataclass(frozen=True, slots=True)
class Stored:
    piece: Piece
    sha256: bytes
    record: Record
    proof: ShardProof | None = None


@dataclass(slots=True)
class StoredRun:
    """A run as the index has it: `cache/runs.py`. `content` may be changed before it is written."""

    digest: Digest
    size: int
    number: int
    kept_for: Askers
    used: int
    content: dict[Shard | None, int] = field(default_factory=dict)

    @property
    def key(self) -> RunKey:
        return str(self.digest), self.size, self.number, " ".join(self.kept_for)


def key_of(piece: Piece) -> Key:
    digest, shard = str(piece.block.digest), piece.shard
    k, m, index = (0, 0, 0) if shard is None else (shard.k, shard.m, shard.index)
    return digest, piece.block.index, k, m, index


def parse_row(row: Row) -> Stored:
    """Raises BadInputError on a row that no version of this program wrote."""
    digest, block, k, m, index, sha256, raw, maker, signature = row
    try:
        record = msgspec.msgpack.decode(raw, type=Record)
    except UNDECODABLE as error:
        raise BadInputError(f"record in the row of {digest} #{block} is not readable: {error}") from error
    piece = Piece(BlockId(Digest.parse(digest), block), Shard(k, m, index) if k else None)
    check_piece(piece, record)
    proof = ShardProof(PeerId(maker), sha256, signature) if maker is not None and signature is not None else None
    return Stored(piece, sha256, record, proof)


def _row(stored: Stored) -> Row:
    raw, proof = msgspec.msgpack.encode(stored.record), stored.proof
    signed = (proof.maker, proof.signature) if proof is not None else (None, None)
    return *key_of(stored.piece), stored.sha256, raw, *signed


RunRow = tuple[str, int, int, str, int, bytes]


def parse_run(row: RunRow) -> StoredRun:
    """Raises BadInputError on a row that no version of this program wrote."""
    text, size, number, kept_for, used, raw = row
    try:
        held = _BITS.decode(raw)
    except UNDECODABLE as error:
        raise BadInputError(f"run {number} of {text} is not readable: {error}") from error
    digest = Digest.parse(text)
    count = ObjectRef(digest, size).block_count - number * RUN_BLOCKS
    most, content = 1 << min(RUN_BLOCKS, max(0, count)), dict[Shard | None, int]()
    for k, m, index, bits in held:
        possible = k == m == index == 0 or (k >= 1 and m >= 0 and 0 <= index < k + m <= MAX_SHARDS)
        if not possible or number < 0 or not 0 < bits < most:
            raise BadInputError(f"run {number} of {text} has impossible pieces")
        content[Shard(k, m, index) if k else None] = bits
    askers = tuple(PeerId(peer) for peer in dict.fromkeys(kept_for.split())) if kept_for else READ_HERE
    return StoredRun(digest, size, number, askers, used, content)


def _run_row(run: StoredRun) -> RunRow:
    held = [((s.k, s.m, s.index) if s else (0, 0, 0), bits) for s, bits in run.content.items()]
    return *run.key, run.used, msgspec.msgpack.encode([(*shard, bits) for shard, bits in held])


class DiskIndex:
    """An open index file. `apply` is for one thread at a time; pieces may be read in any thread meanwhile."""

    def __init__(self, database: sqlite3.Connection, reader: sqlite3.Connection) -> None:
        self._database, self._reader = database, reader
        self._reading = threading.Lock()

    def runs(self) -> tuple[list[StoredRun], list[RunKey]]:
        """All runs, the least recently used first, and the keys of those that are malformed. Raises sqlite3.Error."""
        good, bad = [], []
        for row in self._database.execute(f"SELECT {_RUN_COLUMNS} FROM run ORDER BY used"):
            try:
                good.append(parse_run(row))
            except BadInputError as error:
                logger.warning("index: %s", error)
                bad.append(row[:4])
        return good, bad

    def piece(self, piece: Piece) -> Stored | None:
        """The row of a piece; None if there is none, or if it is malformed. Raises sqlite3.Error."""
        query = f"SELECT {_COLUMNS} FROM piece WHERE {_WHERE_KEY}"
        with self._reading:
            row = self._reader.execute(query, key_of(piece)).fetchone()
        try:
            return parse_row(row) if row is not None else None
        except BadInputError as error:
            logger.warning("index: %s", error)
            return None

    def signed_by(self, signer: PeerId, digest: Digest) -> list[Stored]:
        """The pieces of an object whose record has this signer. Raises sqlite3.Error."""
        query = f"SELECT {_COLUMNS} FROM piece WHERE digest = ? AND instr(record, ?) > 0"
        with self._reading:
            rows = self._reader.execute(query, (str(digest), signer.encode())).fetchall()
        signed = []
        for row in rows:
            try:
                signed.append(parse_row(row))
            except BadInputError as error:
                logger.warning("index: %s", error)
        return [stored for stored in signed if stored.record.signer == signer]

    def apply(self, removed: Iterable[Key], added: Iterable[Stored], runs: Iterable[StoredRun]) -> None:
        """One transaction; a run without pieces has its row removed. Raises sqlite3.Error if none of it was done."""
        runs = list(runs)
        with self._database:
            self._database.execute("BEGIN")
            self._database.executemany(f"DELETE FROM piece WHERE {_WHERE_KEY}", removed)
            places = ", ".join("?" * len(_COLUMNS.split(", ")))
            self._database.executemany(f"INSERT OR REPLACE INTO piece ({_COLUMNS}) VALUES ({places})", map(_row, added))
            gone = [run.key for run in runs if not run.content]
            self._database.executemany(f"DELETE FROM run WHERE {_WHERE_RUN}", gone)
            places = ", ".join("?" * len(_RUN_COLUMNS.split(", ")))
            rows = [_run_row(run) for run in runs if run.content]
            self._database.executemany(f"INSERT OR REPLACE INTO run ({_RUN_COLUMNS}) VALUES ({places})", rows)

    def drop_runs(self, keys: Iterable[RunKey]) -> None:
        """Raises sqlite3.Error if none of it was done."""
        with self._database:
            self._database.execute("BEGIN")
            self._database.executemany(f"DELETE FROM run WHERE {_WHERE_RUN}", keys)

    def close(self) -> None:
        if self._reader is not self._database:
            self._reader.close()
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
        migrate(database, path)
        for pragma in PRAGMAS:
            database.execute(f"PRAGMA {pragma}")
        # A damaged row of a piece shows when it is read. Checking all of them would take minutes for a large disk.
        problem = database.execute("PRAGMA quick_check(run)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
        if str(path) == ":memory:":
            return DiskIndex(database, database)
        reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        reader.execute("SELECT 1 FROM piece LIMIT 1").fetchone()  # opens its files while that is possible
    except BaseException:
        database.close()
        raise
    return DiskIndex(database, reader)
