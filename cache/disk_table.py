"""The disk store's state in memory: which pieces it holds, in which files, and how much room is left.

No file is touched here. A removed piece stays charged to the budget until a flush has deleted its row and given its
bytes back (`cache/disk_flush.py`).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from sys import intern

import msgspec

from cache.disk_index import Stored
from cache.files import Identity
from cache.pieces import CORRELATED_S, MAX_ENTRIES, Bitmaps, length_of
from cache.recovery import Folder, offset_of, relative_path, space
from cache.segments import SegmentedPolicy
from cache.store import READ_HERE, Askers
from protocol.ids import BLOCK_SIZE, BlockId, Digest, PeerId, Piece, Shard
from protocol.records import Record
from protocol.shard_proofs import ShardProof

MAX_REFERENCES = 1024
"""Blocks referenced at one opening of a sealed object (3 ms); the next opening of a larger object continues there."""
EVICTION_SHARE = 64
MAX_EVICTION = 64 << 20
"""A full store evicts budget / EVICTION_SHARE at once, so that not every put waits for a flush."""
SPARE_AGE_S = 1.0
"""How old an answer of statvfs may be."""


@dataclass(slots=True, eq=False)
class File:
    """`checked` has a bit for each block that was right in this process since the file's identity was noted."""

    digest: Digest
    shard: Shard | None
    path: str
    pieces: int = 0
    identity: Identity | None = None
    checked: int = 0
    sealed: bool = False
    leases: int = 0
    referenced_at: float = -math.inf
    next_reference: int = 0

    def note(self, identity: Identity) -> bool:
        """Compare the file's identity with the earlier one; if it has changed, void `checked` and `sealed`: False."""
        if identity == self.identity:
            return True
        self.identity, self.checked, self.sealed = identity, 0, False
        return False


@dataclass(slots=True, eq=False)
class Entry:
    piece: Piece
    record: Record
    sha256: bytes
    length: int
    used: int
    file: File
    kept_for: Askers
    proof: ShardProof | None = None

    @property
    def offset(self) -> int:
        return offset_of(self.piece)

    @property
    def space(self) -> int:
        return space(self.length)

    @property
    def stored(self) -> Stored:
        return Stored(self.piece, self.sha256, self.record, self.used, self.kept_for, self.proof)


@dataclass(slots=True, eq=False)
class PieceTable:
    """`unsynced` are pieces in the page cache without a row; the bytes of `removed` are not given back yet. Some have
    left probation since the last flush, if `claimed`."""

    folder: Folder
    policy: SegmentedPolicy
    entries: dict[Piece, Entry] = field(default_factory=dict)
    bitmaps: Bitmaps = field(default_factory=Bitmaps)
    files: dict[tuple[Digest, Shard | None], File] = field(default_factory=dict)
    unsynced: dict[Piece, Entry] = field(default_factory=dict)
    removed: dict[Piece, Entry] = field(default_factory=dict)
    removed_bytes: int = 0
    claimed: bool = False
    _referenced: set[Piece] = field(default_factory=set)
    _last_used: int = 0

    @property
    def charged(self) -> int:
        return self.policy.bytes + self.removed_bytes

    def adopt(self, rows: list[Stored]) -> None:
        """Hold the pieces in the index that fit the budget: pinned pieces first, then those used here, then those on
        probation, of each the most recently used."""
        self._last_used = max((row.used for row in rows), default=0)
        rows = sorted(rows, key=lambda row: (not self.policy.keeps(row.piece), bool(row.kept_for)))
        entries = [self._entry_of(row) for row in rows]
        totals = accumulate(entry.space for entry in entries[:MAX_ENTRIES])
        kept = sum(total <= self.policy.budget_bytes for total in totals)
        for entry in reversed(entries[:kept]):
            if entry.kept_for:
                self.policy.wanted(entry.space)
            self.add(entry)
        for entry in entries[kept:]:
            self.retire(entry)

    def _entry_of(self, row: Stored) -> Entry:
        entry = self.entry(row.piece, row.record, row.sha256, row.kept_for, proof=row.proof)
        entry.used = row.used
        return entry

    def entry(
        self, piece: Piece, record: Record, sha256: bytes, kept_for: Askers, *, proof: ShardProof | None = None
    ) -> Entry:
        """A new entry, not held yet. Long values are in memory once for all entries."""
        key = piece.block.digest, piece.shard
        file = self.files.get(key)
        if file is None:
            file = self.files[key] = File(*key, f"{self.folder.path}/{relative_path(*key)}")
        digest, signer = intern(record.digest), PeerId(intern(record.signer))
        sha = sha256 if sha256 == record.sha256 else record.sha256
        record = msgspec.structs.replace(record, digest=digest, sha256=sha, signer=signer)
        if proof is not None:
            proof = ShardProof(PeerId(intern(proof.maker)), sha256, proof.signature)
        own = Piece(BlockId(file.digest, piece.block.index), file.shard)
        kept_for = tuple(PeerId(intern(peer)) for peer in kept_for)
        return Entry(
            piece=own,
            record=record,
            sha256=sha256,
            length=length_of(own, record),
            used=self._next_use(),
            file=file,
            kept_for=kept_for,
            proof=proof,
        )

    def _next_use(self) -> int:
        """Unix milliseconds, so that the age of the last use can be derived, but different for each reference."""
        self._last_used = max(self._last_used + 1, int(time.time() * 1000))
        return self._last_used

    def add(self, entry: Entry) -> None:
        if self.policy.keeps(entry.piece):
            entry.kept_for = READ_HERE
        if not self.folder.punching:
            self._assimilate(entry)
        self.policy.add(entry.piece, entry.space, entry.kept_for)
        self.entries[entry.piece] = entry
        self.bitmaps.add(entry.piece)
        entry.file.pieces += 1

    def add_written(self, entry: Entry) -> None:
        """Hold a piece that was just written; a whole block replaces its shards, which can be derived from it."""
        self.add(entry)
        self.unsynced[entry.piece] = entry
        if entry.piece.shard is None and self.folder.punching:
            for shard in self.bitmaps.shards_of(entry.piece.block):
                self.remove(self.entries[shard])

    def has(self, piece: Piece, kept_for: Askers) -> bool:
        """Whether the piece is held. If it is and a client wants it, its probation ends."""
        entry = self.entries.get(piece)
        if entry is not None and entry.kept_for and not kept_for:
            self.claim(entry)
        return entry is not None

    def claim(self, entry: Entry) -> None:
        """End the piece's probation."""
        for piece in self._removed_with(entry):
            if piece.kept_for:
                self.policy.claim(piece.piece)
                piece.kept_for, self.claimed = READ_HERE, True
                self._referenced.add(piece.piece)

    def _assimilate(self, entry: Entry) -> None:
        """Pieces of a file without holes are removed together: all of them are on probation, or none."""
        others = self._of_file(entry.file)
        if others and not others[0].kept_for:
            entry.kept_for = READ_HERE
        elif others and not entry.kept_for:
            self.claim(others[0])

    def _removed_with(self, entry: Entry) -> list[Entry]:
        """The piece; if files cannot have holes, all pieces of its file."""
        return [entry] if self.folder.punching else self._of_file(entry.file)

    def _of_file(self, file: File) -> list[Entry]:
        return [self.entries[piece] for piece in self.bitmaps.pieces_of(file.digest, file.shard)]

    def refer(self, entry: Entry) -> None:
        self.policy.refer(entry.piece)
        entry.used = self._next_use()
        self._referenced.add(entry.piece)

    def refer_object(self, file: File, now: float) -> None:
        """Reference the blocks of a whole object, MAX_REFERENCES per call, and no more often than references count."""
        if file.next_reference == 0 and now - file.referenced_at < CORRELATED_S:
            return
        file.referenced_at = now
        stop = min(file.next_reference + MAX_REFERENCES, file.pieces)
        for index in range(file.next_reference, stop):
            entry = self.entries[Piece(BlockId(file.digest, index))]
            self.claim(entry)
            self.refer(entry)
        file.next_reference = stop if stop < file.pieces else 0

    def take_references(self) -> list[Stored]:
        """Pieces referenced since the last call whose rows exist."""
        references, self._referenced, self.claimed = self._referenced, set(), False
        return [self.entries[piece].stored for piece in references if piece not in self.unsynced]

    def remove(self, entry: Entry) -> None:
        """Forget a piece; if files cannot have holes, forget all pieces of its file."""
        for gone in self._removed_with(entry):
            self.policy.remove(gone.piece)
            del self.entries[gone.piece]
            self.bitmaps.remove(gone.piece)
            self.unsynced.pop(gone.piece, None)
            self._referenced.discard(gone.piece)
            gone.file.pieces -= 1
            gone.file.sealed = False
            gone.file.checked &= ~(1 << gone.piece.block.index)
            self.retire(gone)

    def retire(self, entry: Entry) -> None:
        """Charge bytes on the disk that belong to no held piece."""
        self.removed[entry.piece] = entry
        self.removed_bytes += entry.space

    def is_derivable(self, piece: Piece) -> bool:
        """Whether the piece is a shard of a block that is held whole."""
        return piece.shard is not None and Piece(piece.block) in self.entries


class Room:
    """Bounds of the table: the budget, and the part of the file system that stays free: `free_share` of it, and
    `free_bytes`. `timer` in seconds."""

    def __init__(self, table: PieceTable, timer: Callable[[], float]) -> None:
        self._table, self._timer = table, timer
        self._free_share, self._free_bytes = 0.0, 0
        self._spare, self._spare_at = 0, -math.inf

    def resize(self, budget_bytes: int, free_share: float, free_bytes: int) -> None:
        self._table.policy.budget_bytes = budget_bytes if self._table.folder.usable else 0
        self._free_share, self._free_bytes = free_share, free_bytes
        self.recheck()

    def recheck(self) -> None:
        """Ask the file system again at the next check: space was given back."""
        self._spare_at = -math.inf

    def spend(self, written: int) -> None:
        self._spare -= written

    def has(self, need: int) -> bool:
        """Whether `need` more bytes, a multiple of a page, fit within all bounds."""
        fits = self._table.charged + need <= self._table.policy.budget_bytes
        return fits and len(self._table.entries) < MAX_ENTRIES and need <= self._spare_bytes()

    def _spare_bytes(self) -> int:
        """Bytes that may be written before the floor of free disk is reached; negative below it."""
        now = self._timer()
        if now - self._spare_at >= SPARE_AGE_S:
            self._spare, self._spare_at = 0, now
            try:
                disk = os.statvfs(self._table.folder.path)
                floor = max(int(self._free_share * disk.f_blocks * disk.f_frsize), self._free_bytes)
                self._spare = disk.f_bavail * disk.f_frsize - floor
            except OSError as error:
                self._table.folder.warn_once("cannot tell how much disk is free", error)
        return self._spare

    def turn_over(self, need: int) -> None:
        """Remove pieces used here to make place for one of `need` bytes, if they have their full part of the room."""
        budget = min(self._table.policy.budget_bytes, self._table.charged + self._spare_bytes())
        self._remove(self._table.policy.turnover(need, self._extra(budget), budget))

    def may_have(self, need: int, kept_for: Askers) -> bool:
        """Whether `need` bytes for this purpose can fit once others of their kind are evicted."""
        policy = self._table.policy
        shortage = max(0, policy.budget_bytes - self._table.charged - self._spare_bytes())
        return need <= policy.room(kept_for) - (shortage if kept_for else 0)

    def evict(self, need: int, kept_for: Askers = READ_HERE) -> None:
        """Remove the policy's victims, so that after the next flush `need` fits, and a little more."""
        table, policy = self._table, self._table.policy
        leased = sum(entry.space for entry in table.removed.values() if entry.file.leases)
        room = policy.budget_bytes - policy.bytes
        wanted = max(
            need + self._extra(policy.room(kept_for)) + leased,
            room + need - self._spare_bytes() - (table.removed_bytes - leased),
        )
        served = sum(file.pieces * BLOCK_SIZE for file in table.files.values() if file.leases)
        for victim in policy.victims(min(wanted + served, policy.budget_bytes), kept_for, entries=1):
            if policy.budget_bytes - policy.bytes >= wanted and len(table.entries) < MAX_ENTRIES:
                break
            self._remove([victim])

    def _extra(self, room: int) -> int:
        return min(room // EVICTION_SHARE, MAX_EVICTION)

    def _remove(self, victims: list[Piece]) -> None:
        for victim in victims:
            entry = self._table.entries.get(victim)
            if entry is not None and not entry.file.leases:
                self._table.remove(entry)
