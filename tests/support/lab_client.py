"""A client with low CPU use: it pulls an image as containerd does, verifies every digest, and keeps nothing.

Many of them run in one trio program, each with connections from its own namespace. This leaves the processor to the
daemons that are measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import h11
import trio

from tests.support.image import ARCHITECTURE, INDEX, MANIFEST
from tests.support.pull import PullFailedError

LAYERS_AT_ONCE = 3
"""containerd's max_concurrent_downloads."""
IDLE_TRIES = 3
"""Requests in a row that bring no byte of a body before the pull fails; as in containerd."""
RECEIVE = 1 << 18
MAX_MANIFEST = 4 << 20

Connect = Callable[[], Awaitable[trio.SocketStream]]


@dataclass(slots=True)
class Client:
    """`repository` is the path after /v2/. `digest`, if given, is that of the image for which the reference must stand.
    `received` counts body bytes when they arrive, `resumed` the bodies that were cut and requested again from that byte
    on. Both are final when `pull` has ended."""

    connect: Connect
    repository: str
    reference: str
    digest: str = ""
    received: int = 0
    resumed: int = 0
    started: float = 0.0
    ended: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    async def pull(self) -> None:
        """Raises PullFailedError."""
        self.started = trio.current_time()
        index = await self.manifest(self.reference)
        entry = next(row for row in index["manifests"] if row["platform"]["architecture"] == ARCHITECTURE)
        manifest = await self.manifest(entry["digest"])
        limit = trio.CapacityLimiter(LAYERS_AT_ONCE)
        async with trio.open_nursery() as nursery:
            for blob in (manifest["config"], *manifest["layers"]):
                await limit.acquire_on_behalf_of(blob["digest"])  # in the manifest's order, as containerd does
                nursery.start_soon(self._blob, blob["digest"], limit)
        self.ended = trio.current_time()

    async def manifest(self, reference: str) -> dict[str, Any]:
        """`reference` is a tag or a digest. Raises PullFailedError."""
        body = bytearray()
        await self._get(f"manifests/{reference}", body.extend)
        actual = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if ":" in reference and actual != reference:
            raise PullFailedError(f"{reference} has the bytes of {actual}")
        if reference == self.reference and self.digest not in ("", actual):
            raise PullFailedError(f"{reference} stands for {actual}, not for {self.digest}")
        document: dict[str, Any] = json.loads(body)
        return document

    async def _blob(self, digest: str, limit: trio.CapacityLimiter) -> None:
        hasher = hashlib.sha256()
        try:
            await self._get(f"blobs/{digest}", hasher.update)
        finally:
            limit.release_on_behalf_of(digest)
        if f"sha256:{hasher.hexdigest()}" != digest:
            raise PullFailedError(f"{digest} has the bytes of sha256:{hasher.hexdigest()}")

    async def _get(self, tail: str, take: Callable[[memoryview], object]) -> None:
        """Read a whole body. If it breaks off, request the rest."""
        start = idle = 0
        while True:
            came, left = await self._get_from(start, tail, take)
            if not left:
                return
            idle = 0 if came else idle + 1
            if idle > IDLE_TRIES:
                raise PullFailedError(f"{tail} ended {left} bytes early")
            self.resumed += 1
            start += came

    async def _get_from(self, start: int, tail: str, take: Callable[[memoryview], object]) -> tuple[int, int]:
        """Returns how many bytes arrived, and how many are missing."""
        async with await self.connect() as stream:
            connection = h11.Connection(h11.CLIENT)
            headers = [("Host", "bench"), ("Accept", f"{INDEX}, {MANIFEST}"), ("Connection", "close")]
            if start:
                headers.append(("Range", f"bytes={start}-"))
            await stream.send_all(
                connection.send(h11.Request(method="GET", target=f"/v2/{self.repository}/{tail}", headers=headers))
                or b""
            )
            head = connection.next_event()
            while head is h11.NEED_DATA:
                connection.receive_data(await stream.receive_some(RECEIVE))
                head = connection.next_event()
            if not isinstance(head, h11.Response) or head.status_code != (206 if start else 200):
                raise PullFailedError(f"{tail}: {head!r}")
            length = int(dict(head.headers)[b"content-length"])
            left = await self._body(stream, length, connection.trailing_data[0], take)
            return length - left, left

    async def _body(
        self, stream: trio.SocketStream, left: int, came: bytes, take: Callable[[memoryview], object]
    ) -> int:
        """Returns how many of `left` bytes did not arrive. `came` is the part of the body that came with the head."""
        buffer = memoryview(bytearray(RECEIVE))
        part = memoryview(came)
        while True:
            take(part)
            left -= len(part)
            self.received += len(part)
            size = await stream.socket.recv_into(buffer[: min(left, RECEIVE)]) if left else 0
            if not size:
                return left
            part = buffer[:size]
