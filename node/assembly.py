"""The only place that constructs a node. Everything is built once, in stages, and passed as arguments.

The stages, each a function that returns a frozen dataclass, in the order of need:

1. `admitted`: the node's identity, its right to be a member, and its judge of other members' certificates;
2. `storage`: the tiers of the cache, pins, and the tables that survive a restart;
3. `site`: membership, blocks, names and evidence over an exchange. Simulations, tests and benchmarks call the same
   function (or `blocks`, its lower half) with an exchange in memory, stores in memory, and a simulated registry;
4. `clients`: access, lists and prefetch, which only a node with clients needs;
5. `operator`: the control socket, reload and metrics.

node/daemon.py calls them, starts their tasks in one nursery, and ends them in the reverse order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

import trio

from cache.content_store import ContentStore
from cache.disk import DiskStore
from cache.memory import MemoryStore
from cache.tiered import Tiers
from node.blocks.announcer import Announcer
from node.blocks.coded_read import CodedReads
from node.blocks.fetcher import Fetcher, HeldBlocks
from node.blocks.grants import Grants
from node.blocks.holders import Holders
from node.blocks.home import Home
from node.blocks.keeper import Keeper
from node.blocks.questions import Questions
from node.blocks.trust import Trust
from node.blocks.values import CurrentPlacement, Site
from node.config.schema import (
    Config,
    access_grace_s,
    parse_duration,
    parse_floor,
    parse_host_port,
    parse_size,
    tag_policies,
    uplink_policy,
)
from node.content.library import SiteLibrary
from node.content.listings import Listings
from node.content.name_table import NameTable
from node.content.resolver import Names
from node.control.api import NodeControl, Parts, upstream_row
from node.control.cluster_routes import admission_routes, cluster_row
from node.control.doctor import certificate_shown
from node.control.image_routes import offline_routes
from node.control.reload import LiveParts, Reloader
from node.control.routes import Routes
from node.evidence.judge import Judge
from node.exchange.contract import Exchange
from node.exchange.dispatcher import Dispatcher
from node.exchange.tls import TlsExchange
from node.identity import registrar, revocations
from node.identity.credentials import Standing, standing
from node.identity.identity import Identity, load_or_create
from node.identity.registrar import Registrar, Uses
from node.identity.revocations import Revocations
from node.identity.verifier import Admission
from node.images.operations import Offline, OfflineParts
from node.images.pins import Pins, digests_of, load_pins
from node.images.prefetch import Prefetcher
from node.membership.addresses import bulk_addresses
from node.membership.gossip import Gossiper
from node.membership.libp2p import LibP2PSwarm
from node.membership.membership import Membership
from node.membership.view import View
from node.mirror.access import Access, PublicTable
from node.mirror.mirror import Mirror
from node.oci.references import Locator
from node.registry import batching
from node.registry.batching import Origin
from node.registry.uplink import Uplink
from node.registry.upstreams import Upstreams
from node.runtime.disk_writes import written_bytes
from node.runtime.systemd import Notifier
from node.telemetry.metrics import Metrics
from node.telemetry.provenance import Ledger
from protocol import messages
from protocol.directory import Directory
from protocol.health import Health
from protocol.ids import ObjectRef
from protocol.members import Member
from protocol.records import Record, make_record

log = logging.getLogger(__name__)

STOP_S = 15.0
"""Time for running bodies to end, the index to be written and the members to be informed. systemd waits longer."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """Stage 1: who this node is, and whom it admits."""

    identity: Identity
    place: Standing
    revocations: Revocations
    verifier: Admission
    registrar: Registrar

    def record_for(self, ref: ObjectRef, index: int, sha: bytes) -> Record:
        """Sign the record of a block whose sha256 is `sha`."""
        return make_record(ref, index, sha, signer=self.identity.peer_id, sign=self.identity.sign)


def admitted(config: Config, folder: Path) -> Admitted:
    identity = load_or_create(folder)
    place = standing(config, folder, identity)
    revoked = Revocations(folder / revocations.FILE_NAME, place.credentials.authority)
    issuing = Registrar(place.authority, revoked, Uses(folder / registrar.FILE_NAME))
    return Admitted(identity, place, revoked, Admission(place.credentials, revoked), registrar=issuing)


@dataclass(frozen=True, slots=True)
class Storage:
    """Stage 2: what the node keeps."""

    tiers: Tiers
    memory: MemoryStore
    disk: DiskStore
    pins: Pins
    public: PublicTable
    table: NameTable


async def storage(config: Config, folder: Path, admitted: Admitted, stack: AsyncExitStack) -> Storage:
    cache, pinned = config.cache, load_pins(folder / "pins.json")
    share, least = parse_floor(cache.min_free, "cache.min_free")
    budget = parse_size(cache.disk, "cache.disk")
    disk = await stack.enter_async_context(
        DiskStore.open(folder / "cache", budget, free_share=share, free_bytes=least, pinned=digests_of(pinned))
    )
    memory = MemoryStore(parse_size(cache.memory, "cache.memory"), trio.current_time)
    store = cache.containerd_store
    content = ContentStore(Path(store), record_for=admitted.record_for) if store else None
    pins = Pins(folder / "pins.json", pinned, disk)
    public, table = PublicTable(folder / "access.sqlite", pins.has_of), NameTable(folder / "names.sqlite")
    stack.callback(public.close)
    stack.callback(table.close)
    return Storage(Tiers(memory, disk, content), memory, disk, pins=pins, public=public, table=table)


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
        """Have members' requests for blocks, and for where they are, answered."""
        dispatcher.route(self.keeper.handle, messages.GetShard, messages.GetBlock)
        dispatcher.route(self.holders.handle, messages.GetHoldings, messages.FindHolders, messages.Announce)


def blocks(
    identity: Identity,
    view: View,
    exchange: Exchange,
    tiers: Tiers,
    *,
    upstream: batching.Registry,
    nursery: trio.Nursery,
    code: tuple[int, int] = (4, 1),
) -> Blocks:
    """Tasks that outlive a request run in `nursery`. `code` is k data and m parity shards in a site of full size."""
    own, directory, origin = identity.peer_id, Directory(), Origin(upstream, nursery, lambda: len(view.site))
    placement, trust = CurrentPlacement(view, *code), Trust(own, view)
    site = Site(own, view, placement, exchange, health=Health(), trust=trust, tiers=tiers)
    questions, grants = Questions(site), Grants()
    holders = Holders(site, questions, directory)
    home = Home(site, holders, grants, identity=identity, origin=origin, nursery=nursery)
    keeper = Keeper(site, home, questions, grants, nursery=nursery)
    fetcher = Fetcher((HeldBlocks(tiers), CodedReads(site, questions, keeper), home), nursery)
    return Blocks(site, directory, questions, grants, holders=holders, home=home, keeper=keeper, fetcher=fetcher)


@dataclass(frozen=True, slots=True)
class Network:
    """Stage 3: how this node and the other members reach each other."""

    membership: Membership
    exchange: TlsExchange
    dispatcher: Dispatcher
    swarm: LibP2PSwarm
    metrics: Metrics


def network(config: Config, admitted: Admitted) -> Network:
    peers, verifier, place = config.peers, admitted.verifier, admitted.place
    bulk = parse_host_port(peers.bulk, "peers.bulk")
    own = Member(admitted.identity.peer_id, config.node.name, place.site, bulk_addresses(bulk))
    membership, dispatcher = Membership(own, int(time.time() * 1000), Random()), Dispatcher()
    exchange = TlsExchange(
        verifier.server_context,
        verifier.client_context,
        verifier.peer_of,
        listen=bulk,
        locate=membership.find,
        refused=membership.is_refused,
        handler=dispatcher,
        plain=peers.plain,
    )
    swarm = LibP2PSwarm(
        verifier,
        lambda: membership.own,
        joins=admitted.registrar.serve,
        listen=peers.listen,
        bootstrap=[*peers.bootstrap, *place.bootstrap],
        mdns=peers.mdns,
        introduced=membership.introduced,
        current=membership.current,
    )
    return Network(membership, exchange, dispatcher, swarm, metrics=Metrics())


@dataclass(frozen=True, slots=True)
class Participant:
    """Stage 3: the node as a member of its site."""

    membership: Membership
    exchange: Exchange
    gossiper: Gossiper
    blocks: Blocks
    names: Names
    library: SiteLibrary
    ledger: Ledger
    judge: Judge
    announcer: Announcer

    @property
    def services(self) -> tuple[Callable[..., Awaitable[None]], ...]:
        """The tasks that run while the node is a member, for `nursery.start` in this order."""
        return self.exchange.run, self.gossiper.run, self.judge.run, self.announcer.run

    def route(self, dispatcher: Dispatcher, registrar: Registrar) -> None:
        """Have each request of a member answered by the part that it is for."""
        self.blocks.route(dispatcher)
        dispatcher.route(self.gossiper.handle, messages.Ping, messages.PingRequest, messages.Sync)
        dispatcher.route(self.names.handle, messages.Resolve)
        dispatcher.route(self.judge.handle, messages.Accuse)
        dispatcher.route(registrar.handle, messages.Renew)


def site(
    config: Config,
    identity: Identity,
    membership: Membership,
    exchange: Exchange,
    *,
    dispatcher: Dispatcher,
    tiers: Tiers,
    upstreams: Upstreams,
    table: NameTable,
    revocations: Revocations,
    registrar: Registrar,
    metrics: Metrics,
    nursery: trio.Nursery,
    rng: Random,
    public_age: Callable[[Locator], float | None] = lambda locator: None,
    pinned: Callable[[str, str], bool] = lambda source, reference: False,
) -> Participant:
    """Wire a member over `exchange`, whose handler is `dispatcher`. Nothing runs yet: see `Participant.services`."""
    code = config.peers.k, config.peers.m
    parts = blocks(identity, membership, exchange, tiers, upstream=upstreams, nursery=nursery, code=code)
    near, home, questions = parts.site, parts.home, parts.questions
    names = Names(
        near,
        table,
        upstreams,
        questions=questions,
        home=home,
        nursery=nursery,
        policies=tag_policies(config),
        served=metrics.tag_served,
        public_age=public_age,
        pinned=pinned,
    )
    has_mirrors = lambda upstream: len(upstreams.endpoints(upstream)) > 1  # noqa: E731
    judge = Judge(near, home, questions, identity.sign, mirrored=has_mirrors, nursery=nursery, rng=rng)
    announcer, ledger = Announcer(near, questions, parts.directory, membership, trim=table.trim), Ledger()
    library = SiteLibrary(
        near,
        names,
        home,
        parts.grants,
        fetcher=parts.fetcher,
        ledger=ledger,
        metrics=metrics,
        finished=announcer.finished,
    )
    member = Participant(
        membership,
        exchange,
        Gossiper(membership, exchange, revocations),
        parts,
        names=names,
        library=library,
        ledger=ledger,
        judge=judge,
        announcer=announcer,
    )
    member.route(dispatcher, registrar)
    return member


@dataclass(frozen=True, slots=True)
class Registry:
    """The upstreams, and the uplink of each: one for its name, also where a reload takes it out and brings it back."""

    upstreams: Upstreams
    uplinks: dict[str, Uplink]
    sharing: Callable[[], int]

    def uplink(self, name: str) -> Uplink:
        return self.uplinks.setdefault(name, Uplink(name, sharing=self.sharing))


async def registry(config: Config, network: Network, storage: Storage, stack: AsyncExitStack) -> Registry:
    sharing = lambda: len(network.membership.site)  # noqa: E731
    uplinks = {part.name: Uplink(part.name, uplink_policy(part), sharing=sharing) for part in config.upstream}
    upstreams = Upstreams(
        config.upstream,
        count=network.metrics.origin,
        rng=Random(),
        uplinks=uplinks.values(),
        public=storage.public.note,
    )
    return Registry(await stack.enter_async_context(upstreams), uplinks, sharing)


def participant(
    config: Config, admitted: Admitted, storage: Storage, network: Network, *, registry: Registry, nursery: trio.Nursery
) -> Participant:
    return site(
        config,
        admitted.identity,
        network.membership,
        network.exchange,
        dispatcher=network.dispatcher,
        tiers=storage.tiers,
        upstreams=registry.upstreams,
        table=storage.table,
        revocations=admitted.revocations,
        registrar=admitted.registrar,
        metrics=network.metrics,
        nursery=nursery,
        rng=Random(),
        public_age=storage.public.age,
        pinned=storage.pins.names,
    )


@dataclass(frozen=True, slots=True)
class Clients:
    """Stage 4: what only a node with clients of its own needs."""

    access: Access
    listings: Listings
    mirror: Mirror
    prefetcher: Prefetcher
    images: Offline


def clients(
    config: Config,
    folder: Path,
    admitted: Admitted,
    storage: Storage,
    *,
    member: Participant,
    registry: Registry,
    nursery: trio.Nursery,
) -> Clients:
    tag_max_age_s = parse_duration(config.mirror.tag_max_age, "mirror.tag_max_age")
    library, upstreams = member.library, registry.upstreams
    access = Access(
        access_grace_s(config),
        upstreams,
        storage.public,
        member.names.public_age_s,
        nursery=nursery,
        public_grace_s=tag_max_age_s,
        loopback=parse_host_port(config.mirror.listen, "mirror.listen").is_loopback,
    )
    listings = Listings(upstreams.passthrough, library, folder / "listings.sqlite", tag_max_age_s)
    prefetcher = Prefetcher(folder / "prefetch.json", library, member.blocks.fetcher, storage.tiers.holds)
    images = Offline(
        OfflineParts(
            member.blocks.site,
            storage.disk,
            library,
            storage.table,
            pins=storage.pins,
            prefetcher=prefetcher,
            upstreams=upstreams.names,
            record_for=admitted.record_for,
            finished=member.announcer.finished,
            public=storage.public.note,
        )
    )
    mirror = Mirror(library, upstreams.names, listings, access)
    return Clients(access, listings, mirror, prefetcher, images=images)


@dataclass(frozen=True, slots=True)
class Operator:
    """Stage 5: what operators see and change."""

    control: NodeControl
    reloader: Reloader
    routes: Routes


@dataclass(frozen=True, slots=True)
class Source:
    """Where the configuration came from, and the service manager that hears when it is read again."""

    config: Config
    path: Path | None
    notifier: Notifier


def operator(
    source: Source,
    admitted: Admitted,
    storage: Storage,
    network: Network,
    *,
    registry: Registry,
    member: Participant,
    clients: Clients,
) -> Operator:
    upstreams, place = registry.upstreams, admitted.place
    live = LiveParts(
        upstreams=upstreams,
        uplink_of=registry.uplink,
        names=member.names,
        access=clients.access,
        listings=clients.listings,
        bootstrap=lambda seeds: network.swarm.prepared([*seeds, *place.bootstrap]),
        pins=storage.pins,
        memory=storage.memory,
        disk=storage.disk,
    )
    reloader = Reloader(source.path, source.config, live.prepared, source.notifier)
    control = NodeControl(
        Parts(
            config=lambda: reloader.config,
            site=member.blocks.site,
            membership=member.membership,
            judge=member.judge,
            swarm=network.swarm,
            exchange=network.exchange,
            names=member.names,
            upstreams=upstreams,
            library=member.library,
            ledger=member.ledger,
            metrics=network.metrics,
            mirror_address=source.config.mirror.listen,
            started_at=trio.current_time(),
            cluster=lambda: cluster_row(admitted.verifier, admitted.revocations, place),
            certificate=lambda: certificate_shown(reloader.config, admitted.verifier, admitted.revocations),
            issuers=len(place.bootstrap),
        )
    )
    _watch(network, storage, registry, member, reloader=reloader)
    routes = {
        **offline_routes(clients.images),
        **admission_routes(member.gossiper, admitted.revocations),
        **reloader.routes(),
    }
    return Operator(control, reloader, routes)


def _watch(network: Network, storage: Storage, registry: Registry, member: Participant, *, reloader: Reloader) -> None:
    metrics, exchange = network.metrics, network.exchange
    ledger, membership = member.ledger, member.membership
    metrics.watch_served(
        lambda: {source.value: count for source, count in ledger.bytes_served.items()},
        lambda: {source.value: count for source, count in ledger.requests.items()},
    )
    metrics.watch_members_traffic(
        lambda: {"sent": exchange.statistics().bytes_sent, "received": exchange.statistics().bytes_received}
    )
    metrics.watch_cache(storage.tiers.statistics)
    metrics.watch_wear(written_bytes)
    metrics.watch_tasks(lambda: trio.lowlevel.current_statistics().tasks_living)
    metrics.watch_members(
        lambda: len(membership.site) - 1, lambda: sum(bool(row.quarantine) for row in membership.table())
    )
    metrics.watch_upstreams(lambda: [upstream_row(part, registry.upstreams) for part in reloader.config.upstream])
