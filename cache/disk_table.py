"""The disk store's state in memory: which pieces it holds, and in which files.

No file is touched here. What a store holds is in `cache/runs.py`. A piece has an `Entry` only until its row is in the
index; then a few bits of its run are left of it. A removed piece stays charged to the budget until a flush has deleted
its row and given its bytes back (`cache/disk_flush.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from cache.disk_index import Stored, StoredRun
from cache.files import Identity
from cache.pieces import set_bits
from cache.recovery import FileKey, Folder, relative_path
from cache.runs import RUN_BLOCKS, Run, Runs, slot_of, space
from cache.segments import PINNED, SegmentedPolicy
from cache.store import READ_HERE, Askers
from protocol.ids import BlockId, Buffer, Digest, Piece, Shard
from protocol.records import Record
from protocol.shard_proofs import ShardProof

MAX_RUNS = 1 << 18
"""Runs in one store, each of which takes about 1 KiB of memory regardless of its size: enough for 2 TB of objects of
8 MiB, or 8 TB of larger ones. In a store of more objects than this, the least used ones are evicted."""


@dataclass(slots=True, eq=False)
class File:
    """The file of an object's whole blocks, while this process knows something about it. `checked` has a bit for each
    block that was right in this process since the file's identity was noted."""

    digest: Digest
    identity: Identity | None = None
    checked: int = 0
    sealed: bool = False
    writes: int = 0
    """Writes by this process, each of which changed the identity."""
    seal_size: int = 0
    """Seal the object once its last blocks are written, if it has this size then."""
    leases: int = 0
    referenced_at: float = -math.inf
    next_reference: int = 0

    def note(self, identity: Identity) -> bool:
        """Compare the file's identity with the earlier one; if it has changed, void `checked` and `sealed`: False."""
        if identity == self.identity:
            return True
        self.identity, self.checked, self.sealed = identity, 0, False
        return False


class Files(dict[Digest, File]):
    """`get` returns the file of an object if there is one; `[]` makes it."""

    def __missing__(self, digest: Digest) -> File:
        file = self[digest] = File(digest)
        return file


@dataclass(slots=True, eq=False)
class Entry:
    """A piece that has no row yet. It waits for its write while it has `data`."""

    piece: Piece
    record: Record
    sha256: bytes
    run: Run
    data: Buffer | None
    proof: ShardProof | None = None
    failed: bool = False

    @property
    def key(self) -> FileKey:
        return self.piece.block.digest, self.piece.shard

    @property
    def bit(self) -> int:
        """Its bit in the run."""
        return 1 << self.piece.block.index % RUN_BLOCKS

    @property
    def offset(self) -> int:
        return self.piece.block.index * slot_of(self.piece.shard)

    @property
    def stored(self) -> Stored:
        return Stored(self.piece, self.sha256, self.record, self.proof)


@dataclass(slots=True, eq=False)
class PieceTable:
    """`unsynced` are pieces without a row, and those in `queue` still have to be written. A thread writes to the files
    in `writing`. `removed` has the space of pieces whose bytes are not given back yet. The rows of `changed` runs are
    not as the runs are; `outdated` rows are of no run."""

    folder: Folder
    policy: SegmentedPolicy[Run]
    pinned: set[Digest]
    runs: Runs = field(default_factory=Runs)
    files: Files = field(default_factory=Files)
    unsynced: dict[Piece, Entry] = field(default_factory=dict)
    writing: set[FileKey] = field(default_factory=set)
    leased: set[File] = field(default_factory=set)
    removed: dict[Piece, int] = field(default_factory=dict)
    removed_bytes: int = 0
    queue: dict[Piece, Entry] = field(default_factory=dict)
    queued_bytes: int = 0
    changed: set[Run] = field(default_factory=set)
    outdated: list[StoredRun] = field(default_factory=list)
    _referenced: set[Run] = field(default_factory=set)
    _last_used: int = 0

    @property
    def charged(self) -> int:
        return self.policy.bytes + self.removed_bytes

    def adopt(self, stored: Iterable[StoredRun]) -> None:
        """Hold the runs of the index, the least recently used first. Pieces that two rows name are held once."""
        for row in stored:
            self._last_used = row.used
            for shard, bits in row.content.items():
                kept_for = self._kept_for(row.digest, shard, READ_HERE if row.kept_for == PINNED else row.kept_for)
                bits &= ~self.runs.in_range(row.digest, row.number, shard)
                run = self.runs.run(row.digest, row.size, row.number, kept_for)
                if kept_for != row.kept_for:
                    self.changed.add(run)
                    self.outdated.append(row)
                if bits:
                    self._hold(run, shard, bits, row.used)

    def _kept_for(self, digest: Digest, shard: Shard | None, kept_for: Askers) -> Askers:
        """A shard of a pinned object may be evicted: it can be derived from the block, which a pin has fetched."""
        return PINNED if shard is None and digest in self.pinned else kept_for

    def keeps(self, piece: Piece) -> bool:
        """Whether the piece is never evicted."""
        return piece.shard is None and piece.block.digest in self.pinned

    def _hold(self, run: Run, shard: Shard | None, bits: int, used: int) -> None:
        need = run.space(shard, bits)
        if _on_probation(run):
            self.policy.wanted(need)
        self.runs.add(run, shard, bits)
        run.used = used
        self.policy.add(run, need, run.kept_for)

    def next_use(self) -> int:
        """Unix milliseconds, so that the age of the last use can be derived, but different for each reference."""
        self._last_used = max(self._last_used + 1, int(time.time() * 1000))
        return self._last_used

    def hold(self, piece: Piece, data: Buffer, record: Record, *, sha256: bytes, kept_for: Askers) -> Entry:
        """Hold a piece whose bytes are still to be written. A whole block replaces its shards, which can be derived
        from it. The caller sets the proof."""
        number, bit = divmod(piece.block.index, RUN_BLOCKS)
        kept_for = self._kept_for(piece.block.digest, piece.shard, kept_for)
        if not self.folder.punching:
            kept_for = self._assimilated(piece, kept_for)
        run = self.runs.run(piece.block.digest, record.size, number, kept_for)
        self.runs.add(run, piece.shard, 1 << bit)
        run.used = self.next_use()
        self.policy.add(run, space(len(data)), run.kept_for)
        self.changed.add(run)
        own = Piece(BlockId(run.digest, piece.block.index), piece.shard)
        entry = self.unsynced[own] = self.queue[own] = Entry(own, record, sha256, run, data)
        self.queued_bytes += len(data)
        if piece.shard is None and self.folder.punching:
            for shard in self.runs.shards_of(piece.block):
                self.remove(shard)
        return entry

    def has(self, piece: Piece, kept_for: Askers) -> bool:
        """Whether the piece is held. If it is and a client wants it, its probation ends."""
        run = self.runs.find(piece)
        if run is not None and not kept_for and _on_probation(run):
            self.claim(piece)
        return run is not None

    def claim(self, piece: Piece) -> None:
        """End the piece's probation, if it is on probation."""
        for other in self._removed_with(piece):
            run = self.runs.find(other)
            if run is not None and _on_probation(run):
                self._move(run, other.shard, 1 << other.block.index % RUN_BLOCKS, READ_HERE)

    def claim_range(self, digest: Digest, number: int) -> None:
        """End the probation of the whole blocks of a range."""
        for run in self.runs.at(digest, number):
            if _on_probation(run) and run.blocks:
                self._move(run, None, run.blocks, READ_HERE)

    def _move(self, run: Run, shard: Shard | None, bits: int, kept_for: Askers) -> None:
        need = run.space(shard, bits)
        self.runs.remove(run, shard, bits)
        self.policy.remove(run, need)
        target = self.runs.run(run.digest, run.size, run.number, kept_for)
        self.runs.add(target, shard, bits)
        self.policy.add(target, need, kept_for)
        target.used = max(target.used, run.used)
        self.changed |= {run, target}
        for bit in set_bits(bits) if self.unsynced else ():
            entry = self.unsynced.get(run.piece(bit, shard))
            if entry is not None:
                entry.run = target

    def _assimilated(self, piece: Piece, kept_for: Askers) -> Askers:
        """Pieces of a file without holes are removed together: all of them are on probation, or none."""
        others = self._of_file(piece.block.digest, piece.shard)
        run = self.runs.find(others[0]) if others else None
        if run is not None and not kept_for and _on_probation(run):
            self.claim(others[0])
        return READ_HERE if run is not None and kept_for != PINNED and not _on_probation(run) else kept_for

    def _removed_with(self, piece: Piece) -> list[Piece]:
        """The piece; if files cannot have holes, all pieces of its file."""
        return [piece] if self.folder.punching else self._of_file(piece.block.digest, piece.shard)

    def _of_file(self, digest: Digest, shard: Shard | None) -> list[Piece]:
        return [run.piece(bit, shard) for run in self.runs.of(digest) for bit in set_bits(run.bits(shard))]

    def refer(self, run: Run) -> None:
        self.policy.refer(run)
        run.used = self.next_use()
        self._referenced.add(run)

    def take_rows(self, most: int | None) -> list[tuple[Run, StoredRun]]:
        """The rows of the runs that changed since the last call, without the pieces that have no row yet, and of `most`
        others that were referenced."""
        self._referenced -= self.changed
        taken = list(self.changed)
        for run in list(self._referenced)[:most]:
            self._referenced.discard(run)
            if not run.is_empty:
                taken.append(run)
        self.changed = set()
        without: dict[Run, dict[Shard | None, int]] = {}
        for piece, entry in self.unsynced.items():
            bits = without.setdefault(entry.run, {})
            bits[piece.shard] = bits.get(piece.shard, 0) | entry.bit
        return [(run, stored_run(run, without.get(run, {}))) for run in taken]

    def remove(self, piece: Piece) -> None:
        """Forget a piece; if files cannot have holes, forget all pieces of its file."""
        for gone in self._removed_with(piece):
            run = self.runs.find(gone)
            if run is not None:
                self._remove(run, gone.shard, 1 << gone.block.index % RUN_BLOCKS)

    def give_up(self, run: Run, need: int) -> None:
        """Forget pieces of a run, all of them if they take no more than `need` bytes."""
        for shard, bits in run.content().items():
            if need <= 0:
                return
            if run.space(shard, bits) > need:
                bits = sum(1 << bit for bit in islice(set_bits(bits), -(-need // slot_of(shard))))
            need -= run.space(shard, bits)
            if self.folder.punching:
                self._remove(run, shard, bits)
            else:
                self.remove(run.piece((bits & -bits).bit_length() - 1, shard))

    def _remove(self, run: Run, shard: Shard | None, bits: int) -> None:
        self.runs.remove(run, shard, bits)
        self.policy.remove(run, run.space(shard, bits))
        self.changed.add(run)
        if run.is_empty:
            self._referenced.discard(run)
        file = self.files.get(run.digest) if shard is None else None
        if file is not None:
            file.sealed, file.seal_size = False, 0
            file.checked &= ~(bits << run.number * RUN_BLOCKS)
        for bit in set_bits(bits):
            piece = run.piece(bit, shard)
            self.unsynced.pop(piece, None)
            queued = self.queue.pop(piece, None)
            if queued is None:
                self.removed[piece] = taken = run.space(shard, 1 << bit)
                self.removed_bytes += taken
            elif queued.data is not None:
                self.queued_bytes -= len(queued.data)

    def lose(self, key: FileKey, index: int) -> bool:
        """The bytes of a held piece are not on the disk. Returns whether it was held until now."""
        piece = Piece(BlockId(key[0], index), key[1])
        run = self.runs.find(piece)
        if run is None or piece in self.queue:
            return False
        self._remove(run, piece.shard, 1 << index % RUN_BLOCKS)
        return True

    def is_leased(self, piece: Piece) -> bool:
        """Whether the piece's file is being sent."""
        file = self.files.get(piece.block.digest) if piece.shard is None else None
        return file is not None and file.leases > 0

    def is_busy(self, piece: Piece) -> bool:
        """Whether the piece's file may not be renamed or cut now."""
        return (piece.block.digest, piece.shard) in self.writing or self.is_leased(piece)

    def path(self, key: FileKey) -> str:
        return f"{self.folder.path}/{relative_path(*key)}"

    def pin(self, digest: Digest) -> None:
        self.pinned.add(digest)
        for run in self.runs.of(digest):
            if run.blocks and run.kept_for != PINNED:
                self._move(run, None, run.blocks, PINNED)

    def unpin(self, digest: Digest) -> None:
        self.pinned.discard(digest)
        for run in self.runs.of(digest):
            if run.kept_for == PINNED:
                self._move(run, None, run.blocks, READ_HERE)


def _on_probation(run: Run) -> bool:
    return bool(run.kept_for) and run.kept_for != PINNED


def stored_run(run: Run, without: dict[Shard | None, int]) -> StoredRun:
    content = {shard: bits & ~without.get(shard, 0) for shard, bits in run.content().items()}
    content = {shard: bits for shard, bits in content.items() if bits}
    return StoredRun(run.digest, run.size, run.number, run.kept_for, run.used, content)
