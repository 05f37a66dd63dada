"""Image archives in open files: reading with verification, and writing.

Another process may change the file while it is read. So each block is read twice, hashed both times, and stored only if
the hashes agree. Reading and writing are done in threads, a bounded number of bytes at a time.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import AsyncGenerator, Iterable
from hashlib import sha256

import trio

from node.oci.layout import Packed, PackedImage, layout_files, read_layout
from node.oci.references import ImageName
from node.oci.tar import END, header, padding, read_entries
from protocol.errors import BadInputError, ShoalError
from protocol.ids import BLOCK_SIZE, Buffer, ObjectRef

CHECK_BYTES = 32 << 20
"""Bytes hashed by one call in a thread, which takes 0.1 s."""

HASH = 32
"""Bytes of a sha256."""


class ArchiveError(ShoalError):
    """The archive's file cannot be written; the text says why."""


class ArchiveReader:
    """`fd` stays the caller's to close. Raises BadInputError unless it is a regular file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._length = _regular(fd).st_size

    def _read(self, offset: int, length: int) -> bytes:
        data = bytearray()
        try:
            while len(data) < length:
                part = os.pread(self._fd, length - len(data), offset + len(data))
                if not part:
                    raise BadInputError(f"the archive was cut short at byte {offset + len(data)} while it was read")
                data += part
        except OSError as error:
            raise BadInputError(f"the archive cannot be read at byte {offset}: {error.strerror}") from error
        return bytes(data)

    async def images(self, name: ImageName | None) -> list[PackedImage]:
        """Raises BadInputError, which names the entry of the archive."""

        def read() -> list[PackedImage]:
            return read_layout(read_entries(self._read, self._length), self._read, name)

        return await trio.to_thread.run_sync(read)

    async def hashes(self, packed: Packed) -> AsyncGenerator[bytes, None]:
        """The sha256 of each block, concatenated, CHECK_BYTES at a time.

        Raises BadInputError before the last ones if the object does not have its digest.
        """
        whole = hashlib.new(packed.ref.digest.algorithm)

        def hash_some(first: int, stop: int) -> bytes:
            hashes = bytearray()
            for index in range(first, stop):
                data = self._block(packed, index)
                whole.update(data)
                hashes += sha256(data).digest()
            return bytes(hashes)

        count, step = packed.ref.block_count, CHECK_BYTES // BLOCK_SIZE
        for first in range(0, count, step):
            hashes = await trio.to_thread.run_sync(hash_some, first, min(count, first + step))
            if first + step >= count:
                _check(packed, whole.hexdigest())
            yield hashes
        if not count:
            _check(packed, whole.hexdigest())

    def _block(self, packed: Packed, index: int) -> bytes:
        return self._read(packed.offset + index * BLOCK_SIZE, packed.ref.block_length(index))

    async def block(self, packed: Packed, index: int, sha: bytes) -> bytes:
        """Raises BadInputError if the block is not the one that was hashed."""

        def read() -> bytes:
            data = self._block(packed, index)
            if sha256(data).digest() != sha:
                raise BadInputError(f"{packed.entry}: it was changed while it was imported")
            return data

        return await trio.to_thread.run_sync(read)


def _check(packed: Packed, computed: str) -> None:
    if computed != packed.ref.digest.hex:
        raise BadInputError(f"{packed.entry}: its bytes are not those of its digest")


class ArchiveWriter:
    """Writes one entry after the other, blobs in parts. `fd` stays the caller's to close. Raises ArchiveError."""

    def __init__(self, fd: int) -> None:
        _regular(fd)
        self._fd = fd
        self._offset = 0

    async def begin(self, root: Packed, name: ImageName) -> None:
        await self._write([part for file, data in layout_files(root, name).items() for part in _entry(file, data)])

    async def head(self, packed: Packed) -> None:
        await self._write([header(packed.entry, packed.ref.size)])

    async def data(self, data: Buffer) -> None:
        await self._write([data])

    async def tail(self, ref: ObjectRef) -> None:
        await self._write([padding(ref.size)])

    async def end(self) -> None:
        """Finish the archive durably: its medium is likely to be unplugged next."""
        await self._write([END])
        await trio.to_thread.run_sync(self._sync)

    async def _write(self, parts: Iterable[Buffer]) -> None:
        def write() -> None:
            try:
                for part in parts:
                    view = memoryview(part).cast("B")
                    while view:
                        done = os.pwrite(self._fd, view, self._offset)
                        view, self._offset = view[done:], self._offset + done
            except OSError as error:
                raise ArchiveError(f"the archive cannot be written: {error.strerror}") from error

        await trio.to_thread.run_sync(write)

    def _sync(self) -> None:
        try:
            os.ftruncate(self._fd, self._offset)
            os.fsync(self._fd)
        except OSError as error:
            raise ArchiveError(f"the archive cannot be written: {error.strerror}") from error


def _entry(name: str, data: bytes) -> list[bytes]:
    return [header(name, len(data)), data, padding(len(data))]


def _regular(fd: int) -> os.stat_result:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BadInputError("an archive must be a regular file, not a pipe or a device")
    return status
