"""A memory store that replaces the disk, for nodes without files."""

from __future__ import annotations

from cache.memory import MemoryStore
from protocol.ids import Digest, ObjectRef


class DiskLike(MemoryStore):
    def open_sealed(self, digest: Digest) -> None:
        return None

    def seal(self, ref: ObjectRef) -> bool:
        return False

    def is_pinned(self, digest: Digest) -> bool:
        return False

    async def drop_object(self, digest: Digest) -> None:
        return None
