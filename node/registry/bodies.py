"""Bodies of answers: received into blocks, counted, and limited by the uplink.

`MeteredBody` wraps a `Receiver`: it reserves bytes of the uplink's rate and daily budget, receives, and counts the
bytes received. Manifests, lists and tokens are read whole (`Meter.whole`): they count, but never wait for the uplink.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import cast

import httpx

from node.registry.attempts import FailedAttemptError, reason
from node.registry.transport import Body
from node.registry.uplink import Uplink
from protocol.errors import UnavailableError
from protocol.ids import BLOCK_SIZE, ObjectRef

SKIPPED_BYTES = 256 << 10
"""Buffer for the bytes before the wanted range, from a registry that ignores Range."""
CONTENT_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15}|\*)", re.ASCII)


class _Portions:
    """A body from httpx's own transport, which is used for the proxies that the environment names."""

    def __init__(self, portions: AsyncIterator[bytes]) -> None:
        self._portions = portions
        self._rest = memoryview(b"")

    async def recv_into(self, view: memoryview) -> int:
        if not self._rest:
            self._rest = memoryview(await anext(self._portions, b""))
        count = min(len(view), len(self._rest))
        view[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


Receiver = Body | _Portions


@asynccontextmanager
async def receiver_of(response: httpx.Response) -> AsyncIterator[Receiver]:
    direct: Body | None = response.extensions.get("body")
    async with aclosing(cast(AsyncGenerator[bytes, None], response.aiter_raw())) as portions:
        yield direct or _Portions(portions)


class Meter:
    """Counts the bytes of all bodies of one registry or mirror, and charges them to the uplink."""

    def __init__(self, uplink: Uplink, count: Callable[[int], None]) -> None:
        self.uplink, self._count = uplink, count
        self.received = 0

    def note(self, count: int) -> None:
        self.received += count
        self._count(count)

    async def whole(self, response: httpx.Response, limit: int, subject: str) -> bytes:
        """Raises UnavailableError, which names `subject`, if the body is larger than `limit` bytes."""
        body = bytearray()
        try:
            async with aclosing(cast(AsyncGenerator[bytes, None], response.aiter_raw())) as portions:
                async for portion in portions:
                    self.note(len(portion))
                    self.uplink.note(len(portion))
                    body += portion
                    if len(body) > limit:
                        raise UnavailableError(f"{subject}: larger than {limit} bytes")
        except httpx.HTTPError as error:
            raise FailedAttemptError(reason(error), again=True) from error
        return bytes(body)


class MeteredBody:
    """A receiver within the uplink's limits. Raises FailedAttemptError, UnavailableError and MakeWayError."""

    def __init__(self, body: Receiver, meter: Meter, *, background: bool) -> None:
        self._body, self._meter, self._background = body, meter, background

    async def recv_into(self, view: memoryview) -> int:
        uplink = self._meter.uplink
        taken, count = await uplink.take(len(view), background=self._background), 0
        try:
            count = await self._body.recv_into(view[: taken.count])
        except httpx.HTTPError as error:
            raise FailedAttemptError(reason(error), again=True) from error
        finally:
            uplink.came(taken, count)
        if not count:
            raise FailedAttemptError("the body ended early", again=True)
        self._meter.note(count)
        return count

    async def skip(self, count: int) -> None:
        scratch = memoryview(bytearray(min(count, SKIPPED_BYTES)))
        while count:
            count -= await self.recv_into(scratch[:count])


@dataclass(frozen=True, slots=True)
class Begun:
    """The first `filled` bytes of block `index`. The buffer has room for the rest."""

    ref: ObjectRef
    index: int
    block: bytearray
    filled: int


class BlockCutter:
    """Cuts bytes into blocks, across any number of responses. `position` is the offset of the next byte to request,
    `coming` is called whenever bytes arrive."""

    def __init__(self, ref: ObjectRef, first: int, count: int, coming: Callable[[], None] = lambda: None) -> None:
        self.ref, self._coming = ref, coming
        self._count: Callable[[int], None] = lambda _: None
        self._stop_index = first + count
        self.index = first
        self._filled = 0
        self._block = bytearray()
        self.stop = min(self._stop_index * BLOCK_SIZE, ref.size)

    def watch(self, count: Callable[[int], None]) -> None:
        """From now on, call `count` with the number of bytes that arrive."""
        self._count = count

    @property
    def position(self) -> int:
        return self.index * BLOCK_SIZE + self._filled

    @property
    def done(self) -> bool:
        return self.index >= self._stop_index

    def resume(self, begun: Begun) -> None:
        """Continue the current block, which must be the same."""
        self._block, self._filled = begun.block, begun.filled

    @property
    def begun(self) -> Begun | None:
        """The current block if some of its bytes have arrived."""
        return Begun(self.ref, self.index, self._block, self._filled) if self._filled else None

    def room(self) -> memoryview:
        """The buffer for the block's missing bytes, allocated at the block's first byte."""
        if not self._block:
            self._block = bytearray(self.ref.block_length(self.index))
        return memoryview(self._block)[self._filled :]

    def filled(self, count: int) -> bytearray | None:
        """Note that `count` more bytes are in the buffer. Returns the block if they complete it."""
        self._filled += count
        self._count(count)
        self._coming()
        if self._filled < len(self._block):
            return None
        block, self._block, self._filled = self._block, bytearray(), 0
        self.index += 1
        return block


def other_size() -> FailedAttemptError:
    """Sizes in requests are claims: no block is returned, and no record signed, for a size that is contradicted."""
    return FailedAttemptError("the object has another size than expected", again=False)


def body_start(response: httpx.Response, start: int, stop: int, size: int) -> int:
    """The offset, in the object, of the body's first byte if [start, stop) was requested. Raises FailedAttemptError."""
    if response.status_code == 200:
        if response.headers.get("content-length", str(size)) != str(size):
            raise other_size()
        return 0
    match = CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if not match or int(match[1]) != start or not start < int(match[2]) + 1 <= stop or match[3] not in ("*", str(size)):
        raise FailedAttemptError("answered another range than was asked for", again=False)
    return start
