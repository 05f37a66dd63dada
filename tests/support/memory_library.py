"""A library whose few objects are in a dictionary."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from typing import BinaryIO

from node.oci.manifests import Resolved
from node.oci.references import Locator
from protocol.errors import NotFoundError
from protocol.ids import Digest, ObjectRef


class MemoryLibrary:
    """The library of one repository. `resolve` raises `error` if it is set."""

    def __init__(self, repository: str) -> None:
        self._repository = repository
        self._tags: dict[str, Resolved] = {}
        self._objects: dict[Digest, bytes] = {}
        self.error: Exception | None = None

    def tag(self, name: str, body: bytes, media_type: str) -> None:
        digest = Digest("sha256", hashlib.sha256(body).hexdigest())
        self._objects[digest] = body
        self._tags[name] = Resolved(ObjectRef(digest, len(body)), media_type)

    async def resolve(self, locator: Locator, reference: str) -> Resolved:
        if self.error is not None:
            raise self.error
        if locator.repository != self._repository or reference not in self._tags:
            raise NotFoundError(f"{reference} is not here")
        return self._tags[reference]

    async def read(self, locator: Locator, ref: ObjectRef, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        yield self._objects[ref.digest][start:stop]

    async def sized(self, locator: Locator, resolved: Resolved) -> Resolved:
        return resolved

    def holds_sealed(self, locator: Locator, ref: ObjectRef) -> bool:
        return False

    def sealed(self, ref: ObjectRef, start: int, stop: int) -> BinaryIO | None:
        return None
