"""N nodes of the shipped code in one process, on a simulated network.

node/assembly.py builds each node as it builds that of p2pd. Five parts use sockets or files: the mirror's HTTP, TLS,
libp2p's introduction, the disk, and the transport of the registry's client. simulations/network.py,
simulations/stores.py, simulations/registry.py and this file replace them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node import assembly
from node.config.schema import Config, tag_policies
from node.content.known_names import KnownNames
from node.content.name_table import NameTable
from node.exchange.contract import Answer, Sender
from node.exchange.memory import MemoryExchange
from node.exchange.requests import Dispatcher
from node.identity.identity import Identity
from node.identity.registrar import Registrar, Uses
from node.identity.revocations import Revocations
from node.membership.membership import Membership
from node.registry.upstreams import Upstreams
from node.telemetry.metrics import Metrics
from protocol.ids import ObjectRef, PeerId
from protocol.members import Member
from protocol.messages import GetShards, Request
from simulations.network import Port, SimulatedNetwork
from simulations.passports import Office
from simulations.registry import PART, Image, Registry, locator, wired
from simulations.stores import SharedBytes, tiers

NOWHERE = Path("/nonexistent")
"""A path that does not exist, for files without which a node also works."""
IN_MEMORY = Path(":memory:")
LAYERS_AT_ONCE = 3
"""Layers that containerd reads at a time."""
BORN_MS = 1_700_000_000_000


@dataclass(frozen=True, slots=True)
class Machine:
    """A node's links in bytes per second, and its cache budgets in bytes."""

    up: float
    down: float
    memory: int = 64 << 20
    disk: int = 10 << 30


def identity_of(seed: int, number: int) -> Identity:
    return Identity.of(Ed25519PrivateKey.from_private_bytes(sha256(f"node {number} of run {seed}".encode()).digest()))


class Node:
    """A node until its next restart, which builds a new Node. `life` counts the restarts."""

    def __init__(self, cluster: Cluster, number: int, identity: Identity, own: Member, *, life: int) -> None:
        self.number, self.own, self.peer = number, own, identity.peer_id
        self.life = life
        self._cluster, self._identity = cluster, identity
        self.scope = trio.CancelScope()
        self.clients: set[trio.CancelScope] = set()
        """Reads that are broken off when the node stops."""
        self.passports = cluster.office.passports(identity, own, serial=number + 1)
        self.membership = Membership(own, BORN_MS + life, self._rng("membership"), self.passports)
        self.dispatcher = Dispatcher()
        self.exchange = MemoryExchange(
            cluster.network,
            self.peer,
            refused=self.membership.is_refused,
            handler=self.handle,
            server=self.serve,
        )
        self.tiers = tiers(cluster.machine.memory, cluster.machine.disk, cluster.shared)

    def _rng(self, part: str) -> Random:
        return Random(f"{self._cluster.seed} {self.number} {self.life} {part}")

    async def handle(self, peer: PeerId, request: Request) -> Answer:
        return await self.dispatcher(peer, request)

    async def serve(self, peer: PeerId, request: GetShards, sender: Sender) -> None:
        await self.dispatcher.stream(peer, request, sender)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            async with trio.open_nursery() as work:
                self._assemble(work)
                for service in self.member.services:
                    await work.start(service)
                task_status.started()

    def upstreams(self, kind: type[Upstreams] = Upstreams) -> Upstreams:
        """The registry as this node reads it. A node that misreads it overrides this method."""
        return kind(
            [PART],
            count=lambda upstream, count: None,
            rng=self._rng("upstreams"),
            connect=wired(self._cluster.registry, self._cluster.network, self.peer, self.own.site),
        )

    def _assemble(self, work: trio.Nursery) -> None:
        cluster, config = self._cluster, Config()
        self.member = assembly.site(
            config,
            self._identity,
            self.membership,
            self.exchange,
            tiers=self.tiers,
            upstreams=self.upstreams(),
            names=KnownNames(NameTable(IN_MEMORY, trio.current_time), tag_policies(config)),
            revocations=cluster.revocations,
            metrics=cluster.metrics,
            nursery=work,
            rng=Random(cluster.seed),
        )
        self.member.route(self.dispatcher, Registrar(None, cluster.revocations, Uses(NOWHERE)))
        self.library, self.blocks = self.member.library, self.member.blocks

    def stop(self) -> None:
        for scope in (self.scope, *self.clients):
            scope.cancel()

    # Clients

    @contextmanager
    def client(self) -> Iterator[trio.CancelScope]:
        with trio.CancelScope() as scope:
            self.clients.add(scope)
            try:
                yield scope
            finally:
                self.clients.remove(scope)

    async def pull(self, image: Image) -> None:
        """Pull an image as containerd does: the tag, the manifest, then three layers at a time."""
        resolved = await self.library.resolve(locator("manifests"), image.tag)
        assert resolved.ref == image.manifest
        await self.read(resolved.ref, "manifests")
        limit = trio.CapacityLimiter(LAYERS_AT_ONCE)
        async with trio.open_nursery() as nursery:
            for layer in image.layers:
                await limit.acquire_on_behalf_of(layer)
                nursery.start_soon(self._layer, layer, limit)

    async def _layer(self, layer: ObjectRef, limit: trio.CapacityLimiter) -> None:
        try:
            await self.read(layer)
        finally:
            limit.release_on_behalf_of(layer)

    async def read(self, ref: ObjectRef, kind: str = "blobs", span: tuple[int, int] | None = None) -> None:
        """Read an object, or bytes `[start, stop)` of it. The library verifies a whole object. Raises ShoalError."""
        start, stop = span or (0, ref.size)
        async with aclosing(self.library.read(locator(kind), ref, start, stop)) as parts:
            async for part in parts:
                self._cluster.note_read(len(part))


class Cluster:
    """The nodes `0` to `count - 1` in sites of equal size, and the parts that they share."""

    def __init__(
        self,
        seed: int,
        count: int,
        network: SimulatedNetwork,
        registry: Registry,
        *,
        machine: Machine,
        sites: int = 1,
        readers: int = 0,
        report: Callable[[int], None] = lambda count: None,
    ) -> None:
        """The first `readers` nodes keep nothing for others. `report`: as for `Setting.cluster`."""
        self.seed, self.network, self.registry, self.machine = seed, network, registry, machine
        self.shared, self.metrics = SharedBytes(), Metrics()
        self.office = Office()
        self.revocations = Revocations(NOWHERE, self.office.authority.der)
        self.note_read = report
        self._identities = [identity_of(seed, number) for number in range(count)]
        self._members = [
            Member(
                identity.peer_id,
                f"n{number}",
                f"site-{number % sites}",
                (f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}:1",),
                weight=float(number >= readers),
            )
            for number, identity in enumerate(self._identities)
        ]
        self.nodes: list[Node] = []
        self.kinds: dict[int, type[Node]] = {}
        """Classes of the nodes that misbehave, by number."""

    async def start(self, nursery: trio.Nursery, life: int = 0) -> None:
        """Start all nodes as if they had known each other for a long time."""
        self.nodes[:] = [self._node(number, life) for number in range(len(self._members))]
        statements = [node.membership.swim.own for node in self.nodes]
        if not life:
            nursery.start_soon(self.network.alarms.run)
        for node in self.nodes:
            node.membership.settled(statements)
            await nursery.start(node.run)

    def _node(self, number: int, life: int) -> Node:
        identity, own = self._identities[number], self._members[number]
        self.network.plug(identity.peer_id, own.site, Port(self.machine.up, self.machine.down))
        return self.kinds.get(number, Node)(self, number, identity, own, life=life)

    async def restart(self, number: int, nursery: trio.Nursery, *, met: Iterable[Node] = ()) -> Node:
        """Restart a node with an empty cache. It is introduced to the nodes in `met`."""
        before = self.nodes[number]
        before.stop()
        node = self.nodes[number] = self._node(number, before.life + 1)
        for other in met:
            node.membership.introduced((other.membership.swim.own,))
        await nursery.start(node.run)
        return node

    async def restart_all(self, nursery: trio.Nursery) -> None:
        """Restart all nodes at once, each with an empty cache."""
        for node in self.nodes:
            node.stop()
        await self.start(nursery, self.nodes[0].life + 1)

    def sent(self) -> Iterator[int]:
        """Bytes sent by each node."""
        return (self.network.port(node.peer).up.carried for node in self.nodes)
