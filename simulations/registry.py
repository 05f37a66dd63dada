"""A registry in virtual time, behind the uplinks of the sites: images of noise, requests and bytes counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from hashlib import sha256
from random import Random

import trio

from node.config import UpstreamPart
from node.locator import Locator, is_digest
from node.objects import Resolved
from protocol.errors import NotFoundError, UnavailableError
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, PeerId
from simulations.network import Latency, SimulatedNetwork

UPSTREAM = "registry.test"
REPOSITORY = "app"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
CONNECT_S = 5.0
"""Until a registry that does not answer is given up."""


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


class Registry:
    """What it holds, and what it was asked for. `latency` is its time to the first byte."""

    def __init__(self, seed: int, latency: Latency) -> None:
        self.latency = latency
        self.rng = Random(f"registry {seed}")
        self.down = False
        self.requests: list[float] = []
        """When each came."""
        self.bytes_by_site: Counter[str] = Counter()
        self.blocks: Counter[tuple[str, int]] = Counter()
        self._bodies: dict[Digest, bytes] = {}
        self._tags: dict[str, Resolved] = {}

    def push(self, tag: str, layers: list[int]) -> Image:
        """An image with layers of these sizes in bytes."""
        refs = tuple(self.add(self.rng.randbytes(size)) for size in layers)
        described = [{"mediaType": LAYER, "digest": str(ref.digest), "size": ref.size} for ref in refs]
        manifest = self.add(json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "layers": described}).encode())
        self._tags[tag] = Resolved(manifest, MANIFEST)
        return Image(tag, manifest, refs)

    def add(self, body: bytes) -> ObjectRef:
        digest = Digest("sha256", sha256(body).hexdigest())
        self._bodies[digest] = body
        return ObjectRef(digest, len(body))

    def find(self, reference: str) -> Resolved:
        if is_digest(reference):
            digest = Digest.parse(reference)
            if digest in self._bodies:
                return Resolved(ObjectRef(digest, len(self._bodies[digest])), MANIFEST)
        elif reference in self._tags:
            return self._tags[reference]
        raise NotFoundError(f"{reference} is not here")

    def block(self, ref: ObjectRef, index: int) -> memoryview:
        start = index * BLOCK_SIZE
        return memoryview(self._bodies[ref.digest])[start : start + ref.block_length(index)]

    def bytes_of(self, ref: ObjectRef) -> bytes:
        return self._bodies[ref.digest]


class Reached:
    """The registry as one node reaches it: what node/origin.py and node/names.py want of node/upstream.py."""

    def __init__(self, registry: Registry, network: SimulatedNetwork, peer: PeerId, site: str) -> None:
        self._registry, self._network, self._peer, self._site = registry, network, peer, site

    def connections(self, upstream: str) -> int:
        return UpstreamPart(name=upstream).connections - 1  # one is for names

    async def resolve(
        self, locator: Locator, reference: str, known: Resolved | None = None
    ) -> tuple[Resolved, bytes | None]:
        await self._asked()
        return self._registry.find(reference), None

    async def blocks(
        self, locator: Locator, ref: ObjectRef, first: int, count: int, *, certain: bool = False,
        background: bool = False,
    ) -> AsyncGenerator[bytearray, None]:  # fmt: skip
        await self._asked()
        uplink, own = self._network.uplink(self._site).down, self._network.port(self._peer).down
        leaves_at = trio.current_time()
        for index in range(first, first + count):
            if not self._network.has_uplink(self._site):
                await trio.sleep(CONNECT_S)
                raise UnavailableError("the registry is silent")
            block = self._registry.block(ref, index)
            # As TCP does, the next block follows this one on the uplink before the node has all of it.
            begins_at, leaves_at = uplink.send(leaves_at, len(block))
            await trio.sleep_until(begins_at)
            await self._network.carry([own], len(block), 0.0)
            await trio.sleep_until(leaves_at)
            self._registry.bytes_by_site[self._site] += len(block)
            self._registry.blocks[str(ref.digest), index] += 1
            yield bytearray(block)

    async def _asked(self) -> None:
        """Connected, and the head of the answer is there. Raises UnavailableError."""
        if not self._network.has_uplink(self._site):
            await trio.sleep(CONNECT_S)
            raise UnavailableError("the registry is out of reach")
        self._registry.requests.append(trio.current_time())
        await trio.sleep(self._registry.latency(self._registry.rng))
        if self._registry.down:
            raise UnavailableError("the registry is down")
