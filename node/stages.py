"""The stages of a node, as values: node/assembly.py builds them, the control socket reads and changes them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from cache.disk import DiskStore
from cache.memory import MemoryStore
from cache.tiered import Tiers
from node.blocks.announcer import Announcer
from node.blocks.fetcher import Fetcher
from node.blocks.grants import Grants
from node.blocks.holders import Holders
from node.blocks.home import Home
from node.blocks.keeper import Keeper
from node.blocks.object_facts import ObjectFacts
from node.blocks.questions import Questions
from node.blocks.values import Site
from node.content.library import SiteLibrary
from node.content.listings import Listings
from node.content.name_table import NameTable
from node.content.resolver import Resolver
from node.content.signatures import SignedLibrary, Verified
from node.content.verification import ObjectVerifier
from node.evidence.judge import Judge
from node.exchange.contract import Exchange
from node.exchange.requests import Dispatcher
from node.exchange.tls import TlsExchange
from node.identity.credentials import Enrollment
from node.identity.identity import Identity
from node.identity.registrar import Registrar
from node.identity.revocations import Revocations
from node.identity.verifier import Verifier
from node.images.operations import ImageOperations
from node.images.pins import Pins
from node.images.prefetch import Prefetcher
from node.membership.gossip import Gossiper
from node.membership.libp2p import LibP2PIntroducer
from node.membership.membership import Membership
from node.mirror.access import Access, PublicTable
from node.mirror.mirror import Mirror
from node.registry.uplink import Uplink
from node.registry.upstreams import Upstreams
from node.telemetry.metrics import Metrics
from node.telemetry.provenance import Provenance
from protocol import messages
from protocol.directory import Directory
from protocol.ids import ObjectRef
from protocol.records import Record, make_record


@dataclass(frozen=True, slots=True)
class Admitted:
    """Stage 1: the identity of this node, and the decision which peers it admits."""

    identity: Identity
    place: Enrollment
    revocations: Revocations
    verifier: Verifier
    registrar: Registrar

    def record_for(self, ref: ObjectRef, index: int, sha: bytes) -> Record:
        """Sign the record of a block whose sha256 is `sha`."""
        return make_record(ref, index, sha, signer=self.identity.peer_id, sign=self.identity.sign)


@dataclass(frozen=True, slots=True)
class Storage:
    """Stage 2: the stores of blocks, and the tables that survive a restart."""

    tiers: Tiers
    memory: MemoryStore
    disk: DiskStore
    facts: ObjectFacts
    pins: Pins
    public: PublicTable
    table: NameTable
    verified: Verified


@dataclass(frozen=True, slots=True)
class Blocks:
    """The lower half of stage 3: single blocks, for this node's clients (`fetcher`) and for other members."""

    site: Site
    directory: Directory
    questions: Questions
    grants: Grants
    holders: Holders
    home: Home
    keeper: Keeper
    fetcher: Fetcher

    def route(self, dispatcher: Dispatcher) -> None:
        """Let the parts answer members' requests for blocks, and for the members that hold them."""
        dispatcher.serve(self.keeper.handle, self.keeper.at_once)
        dispatcher.route(self.holders.handle, messages.GetHoldings, messages.FindHolders, messages.Announce)


@dataclass(frozen=True, slots=True)
class Network:
    """Stage 3: how this node and the other members reach each other."""

    membership: Membership
    exchange: TlsExchange
    dispatcher: Dispatcher
    introducer: LibP2PIntroducer
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Participant:
    """Stage 3: the node as a member of its site."""

    membership: Membership
    exchange: Exchange
    gossiper: Gossiper
    blocks: Blocks
    resolver: Resolver
    verifier: ObjectVerifier
    library: SiteLibrary
    ledger: Provenance
    judge: Judge
    announcer: Announcer

    @property
    def services(self) -> tuple[Callable[..., Awaitable[None]], ...]:
        """The tasks that run while the node is a member, for `nursery.start` in this order."""
        return self.exchange.run, self.gossiper.run, self.judge.run, self.announcer.run

    def route(self, dispatcher: Dispatcher, registrar: Registrar) -> None:
        """Let each part answer the members' requests that are for it."""
        self.blocks.route(dispatcher)
        dispatcher.route(self.gossiper.handle, messages.Ping, messages.PingRequest, messages.Sync)
        dispatcher.route(self.resolver.handle, messages.Resolve)
        dispatcher.route(self.judge.handle, messages.Accuse)
        dispatcher.route(registrar.handle, messages.Renew)


@dataclass(frozen=True, slots=True)
class Registry:
    """Stage 3: the upstreams, and one uplink for each name, which is kept if a reload removes the upstream."""

    upstreams: Upstreams
    uplinks: dict[str, Uplink]
    sharing: Callable[[], int]

    def uplink(self, name: str) -> Uplink:
        return self.uplinks.setdefault(name, Uplink(name, sharing=self.sharing))


@dataclass(frozen=True, slots=True)
class Clients:
    """Stage 4: the parts that only a node with clients of its own needs."""

    access: Access
    library: SignedLibrary
    listings: Listings
    mirror: Mirror
    prefetcher: Prefetcher
    images: ImageOperations


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """All stages of a running node."""

    admitted: Admitted
    storage: Storage
    network: Network
    registry: Registry
    member: Participant
    clients: Clients
