"""N nodes of the shipped code in one process: what p2pd runs behind its mirror, on a simulated network.

Not here, since they are sockets and files: the mirror's HTTP, TLS, the introduction, the disk, and what carries the
questions of the registry's client. Their work is done by simulations/network.py, stores.py and registry.py.
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

from node.announcer import Announcer
from node.certificates import open_authority
from node.config import Config, tag_policies
from node.daemon import CurrentPlacement, Dispatcher
from node.evidence import Judge
from node.exchange import Answer
from node.exchange_memory import MemoryExchange
from node.fetcher import Fetcher
from node.identity import Identity
from node.joining import Registrar, Uses
from node.ledger import Ledger
from node.library import SiteLibrary
from node.membership import Gossiper, Membership
from node.metrics import Metrics
from node.names import Names, NameTable
from node.origin import Origin
from node.revocations import Revocations
from node.seeder import Seeder, Site
from node.trust import Trust
from node.upstream import Upstreams
from protocol.directory import Directory
from protocol.health import Health
from protocol.ids import ObjectRef, PeerId
from protocol.members import Member, State, Update
from protocol.messages import Request
from simulations.network import Port, SimulatedNetwork
from simulations.registry import PART, Image, Registry, locator, wired
from simulations.stores import SharedBytes, tiers

NOWHERE = Path("/nonexistent")
"""For what a node would keep in files: it goes on without."""
IN_MEMORY = Path(":memory:")
LAYERS_AT_ONCE = 3
"""As containerd reads."""
BORN_MS = 1_700_000_000_000


@dataclass(frozen=True, slots=True)
class Machine:
    """Of each node: links in bytes a second, budgets in bytes."""

    up: float
    down: float
    memory: int = 64 << 20
    disk: int = 10 << 30


def identity_of(seed: int, number: int) -> Identity:
    return Identity.of(Ed25519PrivateKey.from_private_bytes(sha256(f"node {number} of run {seed}".encode()).digest()))


class Node:
    """Built anew for each life of a node; `life` counts them."""

    def __init__(self, cluster: Cluster, number: int, identity: Identity, own: Member, life: int) -> None:
        self.number, self.own, self.peer = number, own, identity.peer_id
        self.life = life
        self._cluster, self._identity = cluster, identity
        self.scope = trio.CancelScope()
        self.clients: set[trio.CancelScope] = set()
        """They are broken off when it stops."""
        self.membership = Membership(own, BORN_MS + life, self._rng("membership"))
        self.exchange = MemoryExchange(
            cluster.network, self.peer, refused=self.membership.is_refused, handler=self._handle
        )
        self.tiers = tiers(cluster.machine.memory, cluster.machine.disk, cluster.shared)
        self.ledger = Ledger()
        self._dispatcher: Dispatcher | None = None

    def _rng(self, part: str) -> Random:
        return Random(f"{self._cluster.seed} {self.number} {self.life} {part}")

    async def _handle(self, peer: PeerId, request: Request) -> Answer:
        assert self._dispatcher is not None
        return await self._dispatcher(peer, request)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """As node/daemon.py does."""
        with self.scope:
            async with trio.open_nursery() as work:
                parts = self._build(work)
                for part in parts:
                    await work.start(part.run)
                task_status.started()

    def _build(self, work: trio.Nursery) -> list[MemoryExchange | Gossiper | Judge | Announcer]:
        cluster, identity, membership, config = self._cluster, self._identity, self.membership, Config()
        self.upstreams = Upstreams(
            [PART], count=lambda upstream, count: None, rng=self._rng("upstreams"),
            connect=wired(cluster.registry, cluster.network, self.peer, self.own.site),
        )  # fmt: skip
        gossiper = Gossiper(membership, self.exchange, cluster.revocations)
        placement = CurrentPlacement(membership, config.peers.k, config.peers.m)
        trust, directory = Trust(self.peer, membership), Directory()
        self.site = site = Site(self.peer, membership, placement, self.exchange, Health(), trust, self.tiers)
        self.seeder = Seeder(site, self._origin(work), directory, identity.sign, work)
        table = NameTable(IN_MEMORY, trio.current_time)
        self.names = Names(site, table, self.upstreams, self.seeder, work, tag_policies(config), lambda age_s: None)
        judge = Judge(site, self.seeder, identity.sign, lambda upstream: False, work, Random(cluster.seed))
        announcer = Announcer(site, self.seeder, directory, membership, table)
        self.fetcher = Fetcher(site, self.seeder, work)
        self.library = SiteLibrary(
            site, self.names, self.seeder, self.fetcher, self.ledger, cluster.metrics, announcer.finished
        )
        registrar = Registrar(None, cluster.revocations, Uses(NOWHERE))
        self._dispatcher = Dispatcher(gossiper, self.names, self.seeder, registrar, judge)
        return [self.exchange, gossiper, judge, announcer]

    def _origin(self, work: trio.Nursery) -> Origin:
        return Origin(self.upstreams, work, lambda: len(self.membership.site))

    def stop(self) -> None:
        for scope in (self.scope, *self.clients):
            scope.cancel()

    # What clients do

    @contextmanager
    def client(self) -> Iterator[trio.CancelScope]:
        with trio.CancelScope() as scope:
            self.clients.add(scope)
            try:
                yield scope
            finally:
                self.clients.remove(scope)

    async def pull(self, image: Image) -> None:
        """All of an image, as containerd reads it: the tag, the manifest, then three layers at a time."""
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
        """A whole object, which the library checks against its digest, or a part of it. Raises what became of it."""
        start, stop = span or (0, ref.size)
        async with aclosing(self.library.read(locator(kind), ref, start, stop)) as parts:
            async for part in parts:
                self._cluster.note_read(len(part))


class Cluster:
    """The nodes `0` to `count - 1` in sites of equal size, and what they share."""

    def __init__(
        self, seed: int, count: int, network: SimulatedNetwork, registry: Registry, machine: Machine, *,
        sites: int = 1, readers: int = 0, told: Callable[[int], None] = lambda count: None,
    ) -> None:  # fmt: skip
        """The first `readers` of the nodes keep nothing for others."""
        self.seed, self.network, self.registry, self.machine = seed, network, registry, machine
        self.shared, self.metrics = SharedBytes(), Metrics()
        self.revocations = Revocations(NOWHERE, open_authority().der)
        self.note_read = told
        """Bytes that a client got."""
        self._identities = [identity_of(seed, number) for number in range(count)]
        self._members = [
            Member(one.peer_id, f"n{number}", f"site-{number % sites}", ("192.0.2.1:1",), float(number >= readers))
            for number, one in enumerate(self._identities)
        ]
        self.nodes: list[Node] = []
        self.kinds: dict[int, type[Node]] = {}
        """Of nodes that are not as they should be."""

    async def start(self, nursery: trio.Nursery, life: int = 0) -> None:
        """All nodes, which have known each other for long."""
        self.nodes[:] = [self._node(number, life) for number in range(len(self._members))]
        known = [Update(member, State.ALIVE, BORN_MS + life) for member in self._members]
        if not life:
            nursery.start_soon(self.network.alarms.run)
        for node in self.nodes:
            settle(node.membership, known)
            await nursery.start(node.run)

    def _node(self, number: int, life: int) -> Node:
        identity, own = self._identities[number], self._members[number]
        self.network.plug(identity.peer_id, own.site, Port(self.machine.up, self.machine.down))
        return self.kinds.get(number, Node)(self, number, identity, own, life)

    async def restart(self, number: int, nursery: trio.Nursery, *, met: Iterable[Node] = ()) -> Node:
        """A node's next life, with an empty cache; it meets some members again."""
        before = self.nodes[number]
        before.stop()
        node = self.nodes[number] = self._node(number, before.life + 1)
        for other in met:
            node.membership.introduced((other.own,))
        await nursery.start(node.run)
        return node

    async def restart_all(self, nursery: trio.Nursery) -> None:
        """At once, each with an empty cache."""
        for node in self.nodes:
            node.stop()
        await self.start(nursery, self.nodes[0].life + 1)

    def sent(self) -> Iterator[int]:
        """Bytes that each node sent."""
        return (self.network.port(node.peer).up.carried for node in self.nodes)


def settle(membership: Membership, known: list[Update]) -> None:
    """These members have long known each other: they are no news, which all would pass on for minutes."""
    membership.received(tuple(known), whole_view=True, settled=True)
