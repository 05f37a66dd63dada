"""A registry in virtual time, behind the sites' uplinks. Its images are random bytes. It counts requests and bytes."""

from __future__ import annotations

import json
import re
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from random import Random

import httpx
import trio

from node.config.schema import UpstreamPart
from node.oci.references import Locator
from node.registry.reach import Reach
from node.registry.transport import Connect, client_over
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, PeerId
from simulations.network import Latency, SimulatedNetwork

UPSTREAM = "registry.test"
REPOSITORY = "app"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
PART = UpstreamPart(name=UPSTREAM, url=f"http://{UPSTREAM}")
PORTION_BYTES = 64 << 10
"""Most bytes of a body that arrive at once. What has arrived before a cut is not lost."""
_PATH = re.compile(rf"/v2/{REPOSITORY}/(manifests|blobs)/([^/]+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""httpx needs a TLS context. Without this one it would make a context for each client, which is slow."""


@dataclass(frozen=True, slots=True)
class Image:
    tag: str
    manifest: ObjectRef
    layers: tuple[ObjectRef, ...]

    @property
    def size(self) -> int:
        """Bytes that a pull reads."""
        return self.manifest.size + sum(layer.size for layer in self.layers)


def locator(kind: str) -> Locator:
    return Locator.parse(f"{UPSTREAM}/{REPOSITORY}#{kind}")


@dataclass(frozen=True, slots=True)
class Served:
    """An answer. `length` is that of the body in bytes, also for HEAD, whose body is not sent."""

    status: int
    body: memoryview = field(default_factory=lambda: memoryview(b""))
    length: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)


class Registry:
    """The images, and the requests for them. `latency` is the time to the first byte."""

    def __init__(self, seed: int, latency: Latency) -> None:
        self.latency = latency
        self.rng = Random(f"registry {seed}")
        self.fault: Callable[[], Served | None] = lambda: None
        """Returns the answer to a request during a fault, or None if there is no fault."""
        self.attempts: list[tuple[float, PeerId]] = []
        """Time and node of each request, also of those that did not reach the registry."""
        self.methods: Counter[str] = Counter()
        """Requests that arrived, by method and path."""
        self.requests: list[float] = []
        """The time when each request arrived."""
        self.sent: list[tuple[float, int]] = []
        """Time and size of each part of a body that a node received."""
        self.bytes_by_site: Counter[str] = Counter()
        self._bodies: dict[str, bytes] = {}
        """By digest."""
        self._tags: dict[str, str] = {}

    def push(self, tag: str, layers: list[int]) -> Image:
        """Add an image with layers of these sizes in bytes."""
        refs = tuple(self.add(self.rng.randbytes(size)) for size in layers)
        described = [{"mediaType": LAYER, "digest": str(ref.digest), "size": ref.size} for ref in refs]
        manifest = self.add(json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "layers": described}).encode())
        self.tag(tag, manifest)
        return Image(tag, manifest, refs)

    def tag(self, tag: str, manifest: ObjectRef) -> None:
        """Let the tag stand for this manifest from now on."""
        self._tags[tag] = str(manifest.digest)

    def add(self, body: bytes) -> ObjectRef:
        digest = Digest("sha256", sha256(body).hexdigest())
        self._bodies[str(digest)] = body
        return ObjectRef(digest, len(body))

    def answer(self, method: str, path: str, wanted: str) -> Served:
        """`wanted`: the Range header, or ""."""
        if (failed := self.fault()) is not None:
            return failed
        asked = _PATH.fullmatch(path)
        digest = self._tags.get(asked[2], asked[2]) if asked else ""
        if asked is None or digest not in self._bodies:
            return Served(404)
        body = memoryview(self._bodies[digest])
        headers = {"Docker-Content-Digest": digest, "Content-Type": MANIFEST if asked[1] == "manifests" else LAYER}
        if method == "HEAD":
            return Served(200, length=len(body), headers=headers)
        if (part := _RANGE.fullmatch(wanted)) is None:
            return Served(200, body, len(body), headers)
        start, stop = int(part[1]), min(int(part[2]) + 1, len(body))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        return Served(206, body[start:stop], stop - start, headers)


class Wire(httpx.AsyncBaseTransport):
    """A node's connections to the registry: replaces HTTP and sockets below node/registry/client.py."""

    def __init__(self, registry: Registry, network: SimulatedNetwork, peer: PeerId, site: str) -> None:
        self._registry, self._network, self._peer, self._site = registry, network, peer, site

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        registry, timeout = self._registry, request.extensions["timeout"]
        registry.attempts.append((trio.current_time(), self._peer))
        if not self._network.has_uplink(self._site):
            self._reset(httpx.ConnectError)
            with trio.move_on_after(timeout["connect"]) as late:
                await self._network.wait_uplink(self._site)  # TCP tries again
            if late.cancelled_caught:
                raise httpx.ConnectTimeout("out of reach")
        registry.requests.append(trio.current_time())
        registry.methods[f"{request.method} {request.url.path}"] += 1
        answer = registry.answer(request.method, request.url.path, request.headers.get("range", ""))
        latency_s = registry.latency(registry.rng)
        if latency_s > timeout["read"]:
            await trio.sleep(timeout["read"])
            raise httpx.ReadTimeout("slow")
        await trio.sleep(latency_s)
        await self.wait_uplink(timeout["read"])
        body = Body(self, answer.body, timeout["read"])
        headers = {"Content-Length": str(answer.length), **answer.headers}
        return httpx.Response(answer.status, headers=headers, stream=body, extensions={"body": body})

    async def wait_uplink(self, read_s: float) -> None:
        """Raises httpx.ReadTimeout if the uplink is cut for longer than `read_s`."""
        self._reset(httpx.ReadError)
        with trio.move_on_after(read_s) as silent:
            await self._network.wait_uplink(self._site)
        if silent.cancelled_caught:
            raise httpx.ReadTimeout("silent")

    def _reset(self, error: type[httpx.TransportError]) -> None:
        if self._network.resets_uplink(self._site):
            raise error("reset")

    async def carry(self, size: int, leaves_at: float) -> float:
        """Send `size` bytes behind earlier ones, which leave the uplink at `leaves_at`. Returns when these leave it."""
        uplink, own = self._network.uplink(self._site).down, self._network.port(self._peer).down
        # As with TCP, they enter the uplink before the node has received all earlier bytes.
        begins_at, leaves_at = uplink.send(leaves_at, size)
        await trio.sleep_until(begins_at)
        await self._network.carry([own], size, 0.0, rtt_s=self._registry.latency(self._registry.rng))
        await trio.sleep_until(leaves_at)
        self._registry.sent.append((trio.current_time(), size))
        self._registry.bytes_by_site[self._site] += size
        return leaves_at


class Body(httpx.AsyncByteStream):
    """The counterpart of `Body` in node/registry/transport.py."""

    def __init__(self, wire: Wire, data: memoryview, read_s: float) -> None:
        self._wire, self._left, self._read_s = wire, data, read_s
        self._leaves_at = trio.current_time()

    async def recv_into(self, view: memoryview) -> int:
        count = min(len(view), len(self._left), PORTION_BYTES)
        if count:
            self._leaves_at = await self._wire.carry(count, self._leaves_at)
            await self._wire.wait_uplink(self._read_s)
        view[:count], self._left = self._left[:count], self._left[count:]
        return count

    async def __aiter__(self) -> AsyncIterator[bytes]:
        buffer = bytearray(BLOCK_SIZE)
        while count := await self.recv_into(memoryview(buffer)):
            yield bytes(buffer[:count])


def wired(registry: Registry, network: SimulatedNetwork, peer: PeerId, site: str) -> Connect:
    """The argument `connect` of a node's Upstreams."""

    def connect(part: UpstreamPart, _: Reach) -> tuple[httpx.AsyncClient, Callable[[], None]]:
        wire = Wire(registry, network, peer, site)
        return client_over(wire, _CONTEXT, part.connections, environment=False), lambda: None

    return connect
