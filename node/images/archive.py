"""Image archives in open files: reading with verification, and writing.

Another process may change the file while it is read. So each block is read twice, hashed both times, and stored only if
the hashes agree. Reading and writing are done in threads, a bounded number of bytes at a time.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import AsyncGenerator, Callable
from hashlib import sha256

import trio

from cache.files import write_at
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
        self._fd, self._length = fd, _size_of(fd)

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
        """The sha256 of each block, concatenated, CHECK_BYTES at a time. Raises BadInputError before the last ones if
        the object does not have its digest."""
        whole = hashlib.new(packed.ref.digest.algorithm)

        def hash_some(first: int, stop: int) -> bytes:
            hashes = bytearray()
            for index in range(first, stop):
                data = self._block(packed, index)
                whole.update(data)
                hashes += sha256(data).digest()
            return bytes(hashes)

        count, step = packed.ref.block_count, CHECK_BYTES // BLOCK_SIZE
        for first in range(0, max(1, count), step):
            hashes = await trio.to_thread.run_sync(hash_some, first, min(count, first + step))
            if first + step >= count and whole.hexdigest() != packed.ref.digest.hex:
                raise BadInputError(f"{packed.entry}: its bytes do not match its digest")
            yield hashes

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


class ArchiveWriter:
    """Writes one entry after the other, blobs in parts. `fd` stays the caller's to close. Raises ArchiveError."""

    def __init__(self, fd: int) -> None:
        _size_of(fd)
        self._fd, self._offset = fd, 0

    async def begin(self, root: Packed, name: ImageName) -> None:
        for file, data in layout_files(root, name).items():
            await self.write(header(file, len(data)) + data + padding(len(data)))

    async def head(self, packed: Packed) -> None:
        await self.write(header(packed.entry, packed.ref.size))

    async def tail(self, ref: ObjectRef) -> None:
        await self.write(padding(ref.size))

    async def end(self) -> None:
        """Finish the archive durably: its medium is likely to be unplugged next."""
        await self.write(END)
        await self._in_thread(os.ftruncate, self._fd, self._offset)
        await self._in_thread(os.fsync, self._fd)

    async def write(self, data: Buffer) -> None:
        """Bytes of the entry that `head` began."""
        await self._in_thread(write_at, self._fd, data, self._offset)
        self._offset += len(data)

    async def _in_thread(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            await trio.to_thread.run_sync(call, *arguments)
        except OSError as error:
            raise ArchiveError(f"the archive cannot be written: {error.strerror}") from error


def _size_of(fd: int) -> int:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BadInputError("an archive must be a regular file, not a pipe or a device")
    return status.st_size
