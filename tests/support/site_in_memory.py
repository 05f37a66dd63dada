"""Nodes of one site in virtual time: the parts of node/blocks over an exchange in memory, and a registry that counts.

A test may change a node's `registry.target`, its `handler` and `spoil`, and its `view`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace
from hashlib import sha256
from random import Random
from typing import Any, TypeVar

import msgspec
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cache.memory import MemoryStore
from cache.store import Held
from cache.tiered import Tiers
from node import assembly
from node.blocks.keeper import Sent
from node.blocks.values import Obtained, Stretch
from node.content.library import SiteLibrary
from node.content.resolver import Resolver
from node.content.verification import ObjectVerifier
from node.exchange.contract import Answer, Handler, Lane, Sender, Server
from node.exchange.memory import MemoryExchange, MemoryNetwork
from node.exchange.requests import Dispatcher
from node.identity.identity import Identity
from node.oci.references import Grant, Locator
from node.registry import batching
from node.registry.contract import NoNews, RegistryNews
from protocol.errors import DeniedError, ShoalError, UnavailableError
from protocol.ids import BLOCK_SIZE, Buffer, Digest, ObjectRef, PeerId, Piece, Shard
from protocol.members import Member
from protocol.messages import GetShards, Request, ShardFound
from protocol.placement import HOME_HOPS, Route
from protocol.records import Record
from protocol.shard_proofs import make_proof
from tests.support.disk_like import DiskLike
from tests.support.site_library import site_library

LOCATOR = Locator("origin.test", "app", "blobs")
BODY = Random(7).randbytes(3 * BLOCK_SIZE + 100_000)
REF = ObjectRef(Digest("sha256", sha256(BODY).hexdigest()), len(BODY))


class Registry:
    """Gives BODY block by block, and counts the reads of each block."""

    def __init__(self, block_s: float = 0.05) -> None:
        self.asked: Counter[int] = Counter()
        self.down = False
        self.private = False
        self.block_s = block_s
        self.background = block_s
        """Seconds that a background read of a block takes. 0 refuses it."""

    def connections(self, upstream: str) -> int:
        return 4

    async def blocks(
        self, locator: Locator, ref: ObjectRef, first: int, count: int, *, background: bool = False, **_: Any
    ) -> AsyncGenerator[bytearray, None]:
        for index in range(first, first + count):
            if self.down:
                raise UnavailableError("the registry is down")
            if self.private and locator.grant is None:
                raise DeniedError("a grant is needed")
            if background and not self.background:
                raise UnavailableError("not at this hour")
            self.asked[index] += 1
            await trio.sleep(self.background if background else self.block_s)
            yield bytearray(BODY[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])


class WithMirror(Registry):
    """A registry whose mirror, which nodes read first, gives other bytes than the registry itself."""

    async def blocks(self, *run: Any, certain: bool = False, **_: Any) -> AsyncGenerator[bytearray, None]:
        async with aclosing(super().blocks(*run)) as blocks:
            async for block in blocks:
                yield block if certain else bytearray(len(block))


class SwitchedRegistry:
    """The registry of one node. `target` is the one that answers."""

    def __init__(self, target: batching.BlockRanges) -> None:
        self.target = target

    def connections(self, upstream: str) -> int:
        return self.target.connections(upstream)

    def blocks(self, *run: Any, **options: Any) -> AsyncGenerator[bytearray, None]:
        return self.target.blocks(*run, **options)


class FixedView:
    """A view that the test sets."""

    def __init__(self, members: list[Member]) -> None:
        self.site = tuple(sorted(members, key=lambda member: member.peer_id))
        self._members = {member.peer_id: member for member in members}
        self.version = 0
        self.changed_at = -1000.0
        self.failures: list[PeerId] = []
        self.quarantined: dict[PeerId, str] = {}

    def see(self, members: Iterable[Member]) -> None:
        """Change the view of the site. `changed_at` stays, so that the new view counts as settled."""
        self.site = tuple(members)
        self.version += 1

    def replace(self, members: Iterable[Member]) -> None:
        """Change what the members say of themselves."""
        self._members = {member.peer_id: member for member in members}
        self.see(self._members.values())

    def forget(self, peer: PeerId) -> None:
        del self._members[peer]

    def find(self, peer: PeerId) -> Member | None:
        return self._members.get(peer)

    def report_failure(self, peer: PeerId) -> None:
        self.failures.append(peer)

    def quarantine(self, peer: PeerId, reason: str) -> None:
        self.quarantined[peer] = reason

    def is_quarantined(self, peer: PeerId) -> bool:
        return peer in self.quarantined


Spoil = Callable[[ShardFound, Buffer], tuple[ShardFound, Buffer]]


class Spoiling:
    """A `Sender` that alters the parts of a stream."""

    def __init__(self, sender: Sender, spoil: Spoil) -> None:
        self._sender, self._spoil = sender, spoil

    def send(self, message: ShardFound, body: Buffer) -> None:
        self._sender.send(*self._spoil(message, body))

    async def room(self) -> None:
        await self._sender.room()

    def coming(self) -> None:
        self._sender.coming()

    def end(self, error: ShoalError) -> None:
        self._sender.end(error)


class Node:
    """`handler` and `server` answer other members. `spoil` alters the shards and blocks that it sends. A subclass may
    know something of the registries."""

    news_class: type[RegistryNews] = NoNews

    def __init__(
        self, identity: Identity, members: list[Member], network: MemoryNetwork, registry: Any, *, nursery: trio.Nursery
    ) -> None:
        self.identity, self.own = identity, identity.peer_id
        self.view, self.registry = FixedView(members), SwitchedRegistry(registry)
        self.disk = DiskLike(1 << 26, trio.current_time)
        self.tiers = Tiers(MemoryStore(1 << 26, trio.current_time), self.disk, containerd=None)
        self.handler: Handler = self.handle
        self.server: Server = self.serve
        self.exchange = MemoryExchange(
            network,
            self.own,
            refused=self.view.is_quarantined,
            handler=lambda *request: self.handler(*request),
            server=lambda *request: self.server(*request),
        )
        self.news = self.news_class()
        self.blocks = assembly.blocks(
            identity, self.view, self.exchange, self.tiers, upstream=self.registry, nursery=nursery, news=self.news
        )
        self.dispatcher = Dispatcher()
        self.blocks.route(self.dispatcher)
        self.site, self.fetcher = self.blocks.site, self.blocks.fetcher
        self.spoil: Spoil | None = None

    async def handle(self, peer: PeerId, request: Request) -> Answer:
        return await self.dispatcher(peer, request)

    async def serve(self, peer: PeerId, request: GetShards, sender: Sender) -> None:
        await self.dispatcher.stream(peer, request, Spoiling(sender, self.spoil) if self.spoil else sender)

    @property
    def library(self) -> SiteLibrary:
        """A library that only reads objects: it has no names."""
        return self.library_with(None)

    def library_with(self, resolver: Resolver | None) -> SiteLibrary:
        return self.library_and_verifier(resolver)[0]

    def library_and_verifier(self, resolver: Resolver | None = None) -> tuple[SiteLibrary, ObjectVerifier]:
        blocks = self.blocks
        return site_library(self.site, blocks.home, blocks.grants, fetcher=blocks.fetcher, resolver=resolver)

    async def read(
        self, index: int, *, urgent: bool = False, locator: Locator = LOCATOR, background: bool = False
    ) -> Obtained:
        blocks: dict[int, Obtained] = {}
        stretch = Stretch(locator, REF, (index,), background=background)
        order = self.fetcher.begin(stretch, urgent, blocks.__setitem__)
        try:
            await order.wait()
        finally:
            order.release()
        return blocks[index]

    async def read_all(self, locator: Locator = LOCATOR) -> list[Obtained]:
        blocks = [await self.read(index, locator=locator) for index in range(REF.block_count)]
        assert b"".join(bytes(block.held.data) for block in blocks) == BODY
        return blocks

    async def read_granted(self) -> list[Obtained]:
        """Read all blocks for a client of this node that has a grant of the registry."""
        locator = replace(LOCATOR, grant=Grant(f"Bearer of a client of {self.own}"))
        with self.blocks.grants.granted(locator, REF.digest):
            return await self.read_all(locator)

    async def ask_shard(
        self, peer: PeerId, stretch: Stretch, shard: Shard, *, hops: int, keep: bool = False
    ) -> ShardFound:
        """Ask another node for its shard of one block. Nothing is checked but what the exchange checks."""
        parts: list[ShardFound] = []
        await self.blocks.questions.stream(
            *(peer, stretch, shard, lambda message, _: parts.append(message)), hops=hops, lane=Lane.BULK, keep=keep
        )
        return parts[0]

    async def own_shard(self, index: int, shard: Shard) -> Held:
        """Obtain the node's own shard of a block, as if others had asked for it."""
        shards: dict[int, Sent] = {}
        await self.blocks.keeper.own(stretch(index), shard, HOME_HOPS, shards.__setitem__)
        return shards[index][0]

    async def forget(self, index: int) -> None:
        await self.tiers.discard(Piece(REF.block(index)))


AnyNode = TypeVar("AnyNode", bound=Node)
Scenario = Callable[[list[AnyNode], Any, MemoryNetwork], Awaitable[None]]


def site_of(count: int) -> tuple[list[Identity], list[Member]]:
    keys = [Ed25519PrivateKey.from_private_bytes(sha256(bytes([number])).digest()) for number in range(count)]
    identities = [Identity.of(key) for key in keys]
    return identities, [
        Member(identity.peer_id, f"n{number}", "site", (f"192.0.2.{number}:1",))
        for number, identity in enumerate(identities)
    ]


def play(
    count: int, scenario: Scenario, *, make: Callable[..., Node] = Node, registry: Any = None, limit_s: float = 60.0
) -> None:
    """Run a scenario on `count` nodes. It may break their registry and their network."""

    async def main() -> None:
        identities, members = site_of(count)
        network, source = MemoryNetwork(0.001), registry or Registry()
        async with trio.open_nursery() as nursery:
            nodes = [make(identity, members, network, source, nursery=nursery) for identity in identities]
            for node in nodes:
                await nursery.start(node.exchange.run)
            with trio.fail_after(limit_s):
                await scenario(nodes, source, network)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def all_read(nodes: list[Node]) -> None:
    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(node.read_all)


async def read_whole(library: SiteLibrary) -> bytes:
    async with aclosing(library.read(LOCATOR, REF, 0, REF.size)) as chunks:
        return b"".join([bytes(chunk) async for chunk in chunks])


def stretch(index: int, **more: Any) -> Stretch:
    """A block of REF. Each is a stripe of its own."""
    return Stretch(LOCATOR, REF, (index,), **more)


def route_of(node: Node, index: int) -> Route:
    """The way of a node to a block."""
    return node.site.placement().route(node.own, stretch(index).stripe, stretch(index).length)


def keepers_of(nodes: list[AnyNode], index: int) -> list[AnyNode]:
    """The keepers of a block in its root cell, by rank."""
    return [next(node for node in nodes if node.own == peer) for peer in route_of(nodes[0], index).root.keepers]


def home_of(nodes: list[AnyNode], index: int) -> AnyNode:
    return keepers_of(nodes, index)[0]


def not_keeping(nodes: list[AnyNode], index: int) -> AnyNode:
    keepers = keepers_of(nodes, index)
    return next(node for node in nodes if node not in keepers)


def flipped(message: ShardFound, body: Buffer) -> tuple[ShardFound, Buffer]:
    """A part with one wrong bit."""
    wrong = bytearray(body)
    wrong[-1] ^= 128
    return message, wrong


def signing(identity: Identity) -> Spoil:
    """Wrong shards with a proof that `identity` signed over their wrong bytes. Whole blocks are unchanged."""

    def lie(message: ShardFound, body: Buffer) -> tuple[ShardFound, Buffer]:
        if message.k == 1:
            return message, body
        _, wrong = flipped(message, body)
        shard = Shard(message.k, message.m, message.index)
        proof = make_proof(message.record, shard, wrong, maker=identity.peer_id, sign=identity.sign)
        return msgspec.structs.replace(message, proof=proof), wrong

    return lie


def under(record: Record, message: ShardFound, body: Buffer, identity: Identity) -> tuple[ShardFound, Buffer]:
    """A shard under another record, with a proof by `identity`."""
    shard = Shard(message.k, message.m, message.index)
    proof = make_proof(record, shard, body, maker=identity.peer_id, sign=identity.sign)
    return msgspec.structs.replace(message, record=record, proof=proof), body


def unsigned(message: ShardFound, body: Buffer) -> tuple[ShardFound, Buffer]:
    """A wrong shard without a proof."""
    return flipped(msgspec.structs.replace(message, proof=None), body)
