"""What the mirror and the control socket ask of the node: names to descriptors, descriptors to bytes.

`Library` is implemented by node/content/library.py over the site and the registry, and by tests over a dictionary.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol

from node.oci.manifests import Resolved
from node.oci.references import Locator
from protocol.ids import Digest, ObjectRef


class Library(Protocol):
    """Reads of immutable objects, and of the names that lead to them.

    - `resolve` answers for a tag or a digest (of a manifest or a blob, as the locator says). Tags are revalidated after
      their time to live, and served stale within an age limit while the registry is out of reach. Raises
      NotFoundError, DeniedError or UnavailableError.
    - `read` yields the bytes [start, stop) of an object in order, and then those of each of `more`, in chunks within a
      block and one of these ranges, while later blocks still arrive; the first chunk is empty where the first block
      takes so long that a client would give up. All its work ends when the generator is closed (`aclosing`). Of a
      small object nothing is yielded before its digest is right, of a larger one that is read whole its last block is
      not; else CorruptObjectError is raised. A
      block that nobody can give raises UnavailableError. Nothing it yields is altered later.
    - `sealed` gives an open file whose bytes are exactly the object, checked by this process and unchanged since, for
      sendfile; None where there is no such file. Leaving the context closes the file. It tells where the file is from
      and counts the bytes [start, stop) that the caller is about to send as served.
    """

    async def resolve(self, locator: Locator, reference: str) -> Resolved: ...

    def read(
        self, locator: Locator, ref: ObjectRef, start: int, stop: int, *more: tuple[int, int]
    ) -> AsyncGenerator[bytes | bytearray | memoryview, None]: ...

    def sealed(self, digest: Digest, start: int, stop: int) -> AbstractContextManager[BinaryIO] | None: ...
