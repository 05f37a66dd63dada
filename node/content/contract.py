"""The contract between a node and its clients: names to descriptors, descriptors to bytes.

`Library` is implemented by node/content/library.py over the site and the registry, and by tests over a dictionary.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import BinaryIO, Protocol

from node.oci.manifests import Resolved
from node.oci.references import Locator
from protocol.ids import ObjectRef


class Library(Protocol):
    """Reads of immutable objects, and of the names that lead to them.

    - `resolve` accepts a tag or a digest (of a manifest or a blob, as the locator says). Tags are revalidated after
      their time to live, and served stale within an age limit while the registry is out of reach. Raises NotFoundError,
      DeniedError, UnsignedError or UnavailableError.
    - `read` yields the bytes [start, stop) of an object in order, and then those of each range in `more`, while later
      blocks still arrive. A chunk is part of one block and of one range. The first chunk is empty if the first block is
      so late that a client would give up. Closing the generator (`aclosing`) ends all its work. The digest of a small
      object is verified before its first byte is yielded; that of a larger object that is read whole, before its last
      block is. A wrong digest raises CorruptObjectError, a block that no source has UnavailableError, NotFoundError or
      DeniedError. Yielded bytes do not change later.
    - `sized` returns the descriptor of a digest with the object's true size: one that was verified, or that the
      registry told this node. The size in other descriptors is a claim. Raises as `resolve`.
    - `sealed` returns an open file of exactly the object's bytes for sendfile, if this process has checked the file and
      it did not change since; else None. `holds_sealed` is false if it would return None, and for a manifest that
      `read` has to look at first. The caller closes the file. The bytes [start, stop) are counted as served from the
      file's tier.
    """

    async def resolve(self, locator: Locator, reference: str) -> Resolved: ...

    def read(
        self, locator: Locator, ref: ObjectRef, start: int, stop: int, *more: tuple[int, int]
    ) -> AsyncGenerator[bytes | bytearray | memoryview, None]: ...

    async def sized(self, locator: Locator, resolved: Resolved) -> Resolved: ...

    def holds_sealed(self, locator: Locator, ref: ObjectRef) -> bool: ...

    def sealed(self, ref: ObjectRef, start: int, stop: int) -> BinaryIO | None: ...
