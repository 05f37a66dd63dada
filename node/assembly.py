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
from node.config.schema import Config, access_grace_s, tag_policies, uplink_policy
from node.content.known_names import KnownNames
from node.content.library import SiteLibrary
from node.content.listings import Listings
from node.content.name_table import NameTable
from node.content.resolver import Resolver
from node.content.verification import ObjectVerifier
from node.control.api import NodeControl, Parts, upstream_row
from node.control.cluster_routes import cluster_routes, cluster_row
from node.control.doctor import certificate_shown
from node.control.image_routes import image_routes
from node.control.reload import LiveParts, Reloader
from node.control.routes import Route, control_routes
from node.evidence.judge import Judge
from node.exchange.connection import Endpoint
from node.exchange.contract import Exchange
from node.exchange.requests import Dispatcher
from node.exchange.tls import TlsExchange
from node.identity import registrar, revocations
from node.identity.credentials import Enrollment, enroll
from node.identity.identity import Identity, load_or_create
from node.identity.registrar import Registrar, Uses
from node.identity.revocations import Revocations
from node.identity.verifier import Verifier
from node.images.operations import ImageOperations
from node.images.pins import Pins, digests_of, load_pins
from node.images.prefetch import Prefetcher
from node.membership.addresses import bulk_addresses
from node.membership.gossip import Gossiper
from node.membership.libp2p import LibP2PIntroducer
from node.membership.membership import Membership, View
from node.mirror.access import Access, PublicTable
from node.mirror.mirror import Mirror
from node.oci.references import Locator
from node.registry import batching
from node.registry.batching import BatchedReads
from node.registry.uplink import Uplink
from node.registry.upstreams import Upstreams
from node.runtime.disk_writes import written_bytes
from node.runtime.systemd import Notifier
from node.telemetry.metrics import Metrics, cache_metrics, upstream_metrics
from node.telemetry.provenance import Provenance
from protocol import messages
from protocol.directory import Directory
from protocol.health import Health
from protocol.ids import ObjectRef
from protocol.members import Member
from protocol.records import Record, make_record


@dataclass(frozen=True, slots=True)
class Admitted:
    """Stage 1: who this node is, and whom it admits."""

    identity: Identity
    place: Enrollment
    revocations: Revocations
    verifier: Verifier
    registrar: Registrar

    def record_for(self, ref: ObjectRef, index: int, sha: bytes) -> Record:
        """Sign the record of a block whose sha256 is `sha`."""
        return make_record(ref, index, sha, signer=self.identity.peer_id, sign=self.identity.sign)


def admitted(config: Config, folder: Path) -> Admitted:
    identity = load_or_create(folder)
    place = enroll(config, folder, identity)
    revoked = Revocations(folder / revocations.FILE_NAME, place.credentials.authority)
    issuing = Registrar(place.authority, revoked, Uses(folder / registrar.FILE_NAME))
    return Admitted(identity, place, revoked, Verifier(place.credentials, revoked), registrar=issuing)


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
    floor, budget = cache.min_free, cache.disk.bytes
    disk = await stack.enter_async_context(
        DiskStore.open(
            folder / "cache", budget, free_share=floor.share, free_bytes=floor.bytes, pinned=digests_of(pinned)
        )
    )
    memory = MemoryStore(cache.memory.bytes, trio.current_time)
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
    upstream: batching.BlockRanges,
    nursery: trio.Nursery,
    code: tuple[int, int] = (4, 1),
) -> Blocks:
    """Tasks that outlive a request run in `nursery`. `code` is k data and m parity shards in a site of full size."""
    own, directory = identity.peer_id, Directory()
    reads = BatchedReads(upstream, nursery, sharing=lambda: len(view.site))
    placement, trust = CurrentPlacement(view, *code), Trust(own, view)
    site = Site(own, view, placement, exchange, health=Health(), trust=trust, tiers=tiers)
    questions, grants = Questions(site), Grants()
    holders = Holders(site, questions, directory)
    home = Home(site, holders, grants, identity=identity, origin=reads, nursery=nursery)
    keeper = Keeper(site, home, questions, grants, nursery=nursery)
    fetcher = Fetcher((HeldBlocks(tiers), CodedReads(site, questions, keeper), home), nursery)
    return Blocks(site, directory, questions, grants, holders=holders, home=home, keeper=keeper, fetcher=fetcher)


@dataclass(frozen=True, slots=True)
class Network:
    """Stage 3: how this node and the other members reach each other."""

    membership: Membership
    exchange: TlsExchange
    dispatcher: Dispatcher
    introducer: LibP2PIntroducer
    metrics: Metrics


def network(config: Config, admitted: Admitted) -> Network:
    peers, verifier, place = config.peers, admitted.verifier, admitted.place
    own = Member(admitted.identity.peer_id, config.node.name, place.site, bulk_addresses(peers.bulk))
    membership, dispatcher = Membership(own, int(time.time() * 1000), Random()), Dispatcher()
    endpoint = Endpoint(
        verifier.server_context,
        verifier.client_context,
        verifier.peer_of,
        listen=peers.bulk,
        locate=membership.find,
        refused=membership.is_refused,
        handler=dispatcher,
        plain=peers.plain,
    )
    introducer = LibP2PIntroducer(
        verifier,
        joins=admitted.registrar.serve,
        listen=peers.listen,
        bootstrap=[*peers.bootstrap, *place.bootstrap],
        mdns=peers.mdns,
        introduced=membership.introduced,
        current=membership.current,
    )
    return Network(membership, TlsExchange(endpoint), dispatcher, introducer, metrics=Metrics())


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
        """Have each request of a member answered by the part that it is for."""
        self.blocks.route(dispatcher)
        dispatcher.route(self.gossiper.handle, messages.Ping, messages.PingRequest, messages.Sync)
        dispatcher.route(self.resolver.handle, messages.Resolve)
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
    names = KnownNames(table, tag_policies(config), pinned=pinned)
    resolver = Resolver(
        near,
        names,
        upstreams,
        questions=questions,
        home=home,
        nursery=nursery,
        served=metrics.tag_served,
        public_age=public_age,
    )
    judge = Judge(
        site=near,
        home=home,
        questions=questions,
        sign=identity.sign,
        mirrored=lambda upstream: len(upstreams.endpoints(upstream)) > 1,
        nursery=nursery,
        rng=rng,
    )
    announcer, ledger = Announcer(near, questions, parts.directory, membership, trim=table.trim), Provenance()
    verifier = ObjectVerifier(near, home, parts.fetcher, announcer.finished)
    library = SiteLibrary(
        site=near,
        resolver=resolver,
        grants=parts.grants,
        fetcher=parts.fetcher,
        verifier=verifier,
        ledger=ledger,
        metrics=metrics,
    )
    member = Participant(
        membership,
        exchange,
        Gossiper(membership, exchange, revocations),
        parts,
        resolver=resolver,
        verifier=verifier,
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
    images: ImageOperations


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
    tag_max_age_s = config.mirror.tag_max_age.seconds
    library, upstreams = member.library, registry.upstreams
    access = Access(
        access_grace_s(config),
        upstreams,
        storage.public,
        site_says=member.resolver.public_age_s,
        nursery=nursery,
        public_grace_s=tag_max_age_s,
        loopback=config.mirror.listen.is_loopback,
    )
    listings = Listings(upstreams.passthrough, library, folder / "listings.sqlite", tag_max_age_s)
    prefetcher = Prefetcher(
        folder / "prefetch.json",
        library=library,
        verifier=member.verifier,
        fetcher=member.blocks.fetcher,
        holds=storage.tiers.holds,
    )
    images = ImageOperations(
        site=member.blocks.site,
        disk=storage.disk,
        library=library,
        table=storage.table,
        pinned=storage.pins,
        prefetcher=prefetcher,
        upstreams=upstreams.names,
        record_for=admitted.record_for,
        finished=member.announcer.finished,
        public=storage.public.note,
    )
    mirror = Mirror(library, upstreams.names, listings, access)
    return Clients(access, listings, mirror, prefetcher, images=images)


@dataclass(frozen=True, slots=True)
class Operator:
    """Stage 5: what operators see and change."""

    reloader: Reloader
    routes: list[Route]


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
        names=member.resolver.known,
        access=clients.access,
        listings=clients.listings,
        bootstrap=lambda seeds: network.introducer.bootstrap.prepared([*seeds, *place.bootstrap]),
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
            swarm=network.introducer,
            exchange=network.exchange,
            names=member.resolver,
            upstreams=upstreams,
            library=member.library,
            ledger=member.ledger,
            metrics=network.metrics,
            mirror_address=str(source.config.mirror.listen),
            started_at=trio.current_time(),
            cluster=lambda: cluster_row(admitted.verifier, admitted.revocations, place),
            certificate=lambda: certificate_shown(reloader.config, admitted.verifier, admitted.revocations),
            issuers=len(place.bootstrap),
        )
    )
    _watch(network, storage, registry, member, reloader=reloader)
    routes = [
        *control_routes(control),
        *image_routes(clients.images),
        *cluster_routes(member.gossiper, admitted.revocations),
        *reloader.routes(),
    ]
    return Operator(reloader, routes)


def _watch(network: Network, storage: Storage, registry: Registry, member: Participant, *, reloader: Reloader) -> None:
    ledger, membership, exchange = member.ledger, member.membership, network.exchange
    network.metrics.watch(
        bytes_served=lambda: ledger.bytes_served,
        requests=lambda: ledger.requests,
        peer_bytes=lambda: {
            "sent": exchange.statistics().bytes_sent,
            "received": exchange.statistics().bytes_received,
        },
        disk_written_bytes=written_bytes,
        tasks=lambda: trio.lowlevel.current_statistics().tasks_living,
        peers_alive=lambda: len(membership.site) - 1,
        peers_quarantined=lambda: sum(bool(row.quarantine) for row in membership.table()),
        **cache_metrics(storage.tiers.statistics),
        **upstream_metrics(lambda: [upstream_row(part, registry.upstreams) for part in reloader.config.upstream]),
    )
