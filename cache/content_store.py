"""containerd's content store as a read-only tier: blobs that it holds are neither stored twice nor fetched.

Layout (containerd, docs/content-flow.md): `<root>/blobs/<algorithm>/<hex>`, one finished blob in each file. Another
program owns the files, so a blob is trusted only after this process has verified its whole digest, and while its file
keeps the identity that it had then. A wrong blob counts as absent until its file changes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import trio
from cachetools import LRUCache, TTLCache

from cache.files import READ, Identity, identity_of, opened, read_at
from cache.store import READ_HERE, Askers, Held, Holdings, StoreStatistics
from protocol.ids import BLOCK_SIZE, MAX_OBJECT_SIZE, Buffer, Digest, ObjectRef, PeerId, Piece
from protocol.records import Record
from protocol.shard_proofs import ShardProof

logger = logging.getLogger(__name__)

RecordFor = Callable[[ObjectRef, int, bytes], Record]
"""Signs the record of a block from the object, the block's index and its sha256."""
_PLUGIN = "io.containerd.content.v1.content"
_HEX = {"sha256": re.compile(r"[0-9a-f]{64}", re.ASCII), "sha512": re.compile(r"[0-9a-f]{128}", re.ASCII)}
STATUS_AGE_S = 1.0
"""How long `holds` may use an answer of stat."""
LISTING_AGE_S = 10.0
MAX_LISTED = 16384
"""Blobs listed by `objects` and counted: a site's node holds hundreds; listing this many takes 50 ms."""
MAX_STATUSES = 4096
MAX_RECORDS = 8192
"""Signed records that are kept, about 0.5 KiB each; signing a record again takes 0.1 ms."""
MAX_TRUSTED_BLOCKS = (MAX_OBJECT_SIZE // BLOCK_SIZE) + 16
"""Blocks whose sha256 is kept, 32 bytes each: enough for the largest object. A forgotten blob is checked again."""
CHECK_BYTES = 64 << 20
"""Bytes that a check hashes in a thread (0.1 s) before it can be cancelled."""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """Result of checking a whole file. `hashes` has the sha256 of each block, end to end; empty if it was wrong."""

    identity: Identity
    right: bool
    hashes: bytes


def examine(fd: int, digest: Digest) -> Iterator[_Verdict | None]:
    """Hash the open file in bounded memory: None after each CHECK_BYTES, the verdict at the end. Raises OSError."""
    before = identity_of(os.fstat(fd))
    whole, hashes, buffer, offset = hashlib.new(digest.algorithm), bytearray(), bytearray(BLOCK_SIZE), 0
    while offset < before.size:
        length = os.preadv(fd, [buffer], offset)
        if length < min(BLOCK_SIZE, before.size - offset):
            break
        block = memoryview(buffer)[:length]
        whole.update(block)
        hashes += sha256(block).digest()
        offset += length
        if offset % CHECK_BYTES == 0:
            yield None
    right = identity_of(os.fstat(fd)) == before and whole.hexdigest() == digest.hex
    yield _Verdict(before, right, bytes(hashes) if right else b"")


class ContentStore:
    """A BlockStore that declines every put. It has whole blocks only; their records are signed when they are read."""

    def __init__(self, root: Path, *, record_for: RecordFor, timer: Callable[[], float] = time.monotonic) -> None:
        self._roots = root, root / _PLUGIN
        self._record_for, self._timer = record_for, timer
        self._verdicts: LRUCache[Digest, _Verdict] = LRUCache(MAX_TRUSTED_BLOCKS, lambda v: 16 + len(v.hashes) // 32)
        self._records: LRUCache[tuple[Digest, int], Record] = LRUCache(MAX_RECORDS)
        self._statuses: TTLCache[Digest, Identity | None] = TTLCache(MAX_STATUSES, STATUS_AGE_S, timer)
        self._listing: TTLCache[None, dict[Digest, int]] = TTLCache(1, LISTING_AGE_S, timer)
        self._checking = trio.Lock()
        if not any(os.path.isdir(folder / "blobs") for folder in self._roots):
            logger.warning("containerd's content store: %s has no readable folder `blobs`: treated as empty", root)

    def size_of(self, digest: Digest) -> int | None:
        """The size of the object, None if it is absent or was found wrong."""
        identity, verdict = self._status(digest), self._verdicts.get(digest)
        is_wrong = verdict is not None and not verdict.right and verdict.identity == identity
        return None if identity is None or is_wrong else identity.size

    def has_object(self, digest: Digest) -> bool:
        return self.size_of(digest) is not None

    def holds(self, piece: Piece) -> bool:
        if piece.shard is not None:
            return False
        size = self.size_of(piece.block.digest)
        return size is not None and 0 <= piece.block.index * BLOCK_SIZE < size

    def holdings(self, digest: Digest) -> Holdings:
        size = self.size_of(digest) or 0
        return Holdings((1 << ObjectRef(digest, size).block_count) - 1)

    async def signed_by(self, signer: PeerId, digest: Digest) -> dict[Piece, Record]:
        """Nothing: every blob was checked against its digest, which is stronger than a signature."""
        await trio.lowlevel.checkpoint()
        return {}

    def objects(self) -> Iterable[Digest]:
        return list(self._list())

    def statistics(self) -> StoreStatistics:
        sizes = self._list().values()
        return StoreStatistics(sum(sizes), sum(sizes), len(sizes))

    def _status(self, digest: Digest) -> Identity | None:
        try:
            return self._statuses[digest]
        except KeyError:
            located = self._locate(digest)
            self._statuses[digest] = identity = located and located[1]
            return identity

    def _locate(self, digest: Digest) -> tuple[Path, Identity] | None:
        for folder in self._roots:
            path = folder / "blobs" / digest.algorithm / digest.hex
            try:
                status = path.stat(follow_symlinks=False)
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_OBJECT_SIZE:
                return path, identity_of(status)
        return None

    def _list(self) -> dict[Digest, int]:
        listing = self._listing.get(None)
        if listing is None:
            sizes = ((digest, self.size_of(digest)) for digest in islice(self._scan(), MAX_LISTED))
            listing = self._listing[None] = {digest: size for digest, size in sizes if size is not None}
        return listing

    def _scan(self) -> Iterable[Digest]:
        for folder in self._roots:
            for algorithm, pattern in _HEX.items():
                try:
                    with os.scandir(folder / "blobs" / algorithm) as entries:
                        yield from (Digest(algorithm, blob.name) for blob in entries if pattern.fullmatch(blob.name))
                except OSError:
                    continue  # no such folder

    async def get(self, piece: Piece) -> Held | None:
        await trio.lowlevel.checkpoint()
        if not self.holds(piece):
            return None
        digest, index = piece.block.digest, piece.block.index
        trusted = await self._trusted(digest)
        if trusted is None or index * BLOCK_SIZE >= trusted[1].identity.size:
            return None
        path, verdict = trusted
        data = bytearray(min(BLOCK_SIZE, verdict.identity.size - index * BLOCK_SIZE))
        try:
            with opened(path, READ) as fd:
                complete = await read_at(fd, data, index * BLOCK_SIZE)
                unchanged = identity_of(os.fstat(fd)) == verdict.identity
        except OSError as error:
            logger.warning("containerd's content store: cannot read %s: %s", digest, error.strerror)
            return None
        return Held(data, self._record(digest, index, verdict)) if complete and unchanged else None

    async def check(self, digest: Digest) -> bool:
        """Whether the object is there and right; all of it is read unless it was checked before."""
        return await self._trusted(digest) is not None

    async def _trusted(self, digest: Digest) -> tuple[Path, _Verdict] | None:
        """The file and its verdict, if it is right. Files without a verdict are checked one at a time."""
        if self._judged(digest) is None:
            async with self._checking:
                located = self._locate(digest)
                if located is not None and self._judged(digest) is None:
                    await self._check(located[0], digest)
        return self._right(digest)

    def _right(self, digest: Digest) -> tuple[Path, _Verdict] | None:
        judged = self._judged(digest)
        return judged if judged is not None and judged[1].right else None

    def _judged(self, digest: Digest) -> tuple[Path, _Verdict] | None:
        """The verdict on the file as it is now, if there is one."""
        verdict, located = self._verdicts.get(digest), self._locate(digest)
        if verdict is None or located is None or located[1] != verdict.identity:
            return None
        return located[0], verdict

    async def _check(self, path: Path, digest: Digest) -> None:
        try:
            with opened(path, READ) as fd:
                examination, verdict = examine(fd, digest), None
                while verdict is None:
                    verdict = await trio.to_thread.run_sync(next, examination)
        except OSError as error:
            logger.warning("containerd's content store: cannot read %s: %s", digest, error.strerror)
            return
        if not verdict.right:
            logger.warning("containerd's content store: the bytes of %s are wrong: ignored until they change", digest)
        self._verdicts[digest] = verdict
        self._statuses.pop(digest, None)

    def _record(self, digest: Digest, index: int, verdict: _Verdict) -> Record:
        record = self._records.get((digest, index))
        if record is None:
            ref = ObjectRef(digest, verdict.identity.size)
            record = self._record_for(ref, index, verdict.hashes[index * 32 : index * 32 + 32])
            self._records[digest, index] = record
        return record

    def open_sealed(self, digest: Digest) -> BinaryIO | None:
        """The object's file, if it was checked in this process and is unchanged since."""
        if (trusted := self._right(digest)) is None:
            return None
        path, verdict = trusted
        try:
            file = open(os.open(path, READ), "rb", buffering=0)  # noqa: SIM115 # the caller closes it
        except OSError:
            return None
        if identity_of(os.fstat(file.fileno())) != verdict.identity:
            file.close()
            return None
        return file

    async def put(
        self,
        piece: Piece,
        data: Buffer,
        record: Record,
        proof: ShardProof | None = None,
        *,
        kept_for: Askers = READ_HERE,
    ) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    def claim(self, piece: Piece) -> None:
        """containerd decides what it removes."""

    def is_used_here(self, piece: Piece) -> bool:
        return self.holds(piece)

    async def discard(self, piece: Piece) -> None:
        await trio.lowlevel.checkpoint()
