"""The only place that constructs a node. Everything is built once, in stages, and passed as arguments.

Each stage takes the earlier ones as arguments. Stages 1 to 4 are frozen dataclasses of node/stages.py:

1. `admitted`: the node's identity, its right to be a member, and the verifier of other members' certificates;
2. `storage`: the tiers of the cache, pins, and the tables that survive a restart;
3. `network`, `registry`, `participant`: the node as a member. `participant` calls `site`, which builds blocks, names
   and evidence over any exchange. Simulations and tests call `site`, or its lower half `blocks`, with parts in memory;
4. `clients`: access, lists, prefetch and the mirror, which only a node with clients needs;
5. `operator`: the routes of the control socket, reload, and the sources of the metrics.

node/daemon.py calls them in this order, starts the tasks of `services`, and ends everything in the reverse order.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from random import Random

import trio

from cache.content_store import ContentStore
from cache.disk import DiskStore
from cache.memory import MemoryStore
from cache.tiered import Tiers
from node.blocks.announcer import Announcer
from node.blocks.chosen_way import ChosenWay
from node.blocks.coded_read import CodedReads
from node.blocks.fetcher import Fetcher, HeldBlocks
from node.blocks.grants import Grants
from node.blocks.held_objects import holds_all
from node.blocks.holders import Holders
from node.blocks.home import Home
from node.blocks.keeper import Keeper
from node.blocks.object_facts import ObjectFacts
from node.blocks.questions import Questions
from node.blocks.trust import Trust
from node.blocks.values import CurrentPlacement, Site, Storing
from node.blocks.whole_read import WholeReads
from node.config.schema import Config, access_grace_s, tag_policies, uplink_policy
from node.content.known_names import KnownNames
from node.content.library import SiteLibrary
from node.content.listings import Listings
from node.content.name_table import NameTable
from node.content.resolver import Resolver
from node.content.signatures import SignedLibrary, Verified, load_keys
from node.content.verification import ObjectVerifier
from node.control.api import NodeControl, upstream_row
from node.control.reload import Reloader, prepared
from node.control.routes import Route, cluster_routes, control_routes, image_routes
from node.evidence.findings import Findings
from node.evidence.judge import Judge
from node.evidence.judge_file import EvidenceFile
from node.exchange.connection import Endpoint
from node.exchange.contract import Exchange
from node.exchange.requests import Dispatcher
from node.exchange.tls import TlsExchange
from node.identity import registrar, revocations
from node.identity.credentials import enroll, save_joined
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
from node.membership.passports import Passports
from node.membership.peers_file import PeersFile
from node.membership.renewal import Renewal
from node.mirror.access import Access, PublicTable
from node.mirror.mirror import Mirror
from node.oci.references import Locator
from node.registry import batching
from node.registry.batching import BatchedReads
from node.registry.contract import NoNews, RegistryNews
from node.registry.uplink import Uplink, UplinkFile
from node.registry.upstreams import Upstreams
from node.runtime.disk_writes import written_bytes
from node.runtime.hashing import Hashing, HashingThread, inline
from node.runtime.processor_load import ProcessorLoad
from node.runtime.systemd import Notifier
from node.stages import Admitted, Blocks, Clients, Network, Node, Participant, Registry, Storage
from node.telemetry.metrics import Metrics, cache_metrics, upstream_metrics
from node.telemetry.provenance import Provenance
from protocol.directory import Directory
from protocol.health import Health
from protocol.members import Member
from protocol.statements import Author


def admitted(config: Config, folder: Path) -> Admitted:
    identity = load_or_create(folder)
    place = enroll(config, folder, identity)
    revoked = Revocations(folder / revocations.FILE_NAME, place.credentials.authority)
    issuing = Registrar(place.authority, revoked, Uses(folder / registrar.FILE_NAME))
    return Admitted(identity, place, revoked, Verifier(place.credentials, revoked), registrar=issuing)


async def storage(config: Config, folder: Path, admitted: Admitted, stack: AsyncExitStack) -> Storage:
    cache, pinned = config.cache, load_pins(folder / "pins.json")
    floor, budget = cache.min_free, cache.disk.bytes
    disk = await stack.enter_async_context(
        DiskStore.open(
            folder / "cache", budget, free_share=floor.share, free_bytes=floor.bytes, pinned=digests_of(pinned)
        )
    )
    gc.freeze()  # what the disk holds stays: each full collection would scan 10 objects for each run
    memory = MemoryStore(cache.memory.bytes, trio.current_time)
    store = cache.containerd_store
    content = ContentStore(Path(store), record_for=admitted.record_for) if store else None
    pins = Pins(folder / "pins.json", pinned, disk)
    public = PublicTable(folder / "access.sqlite", pins.has_of)
    table = NameTable(folder / "names.sqlite", pinned=disk.is_pinned)
    tiers = Tiers(memory, disk, content)
    facts = ObjectFacts(folder / "objects.sqlite", tiers.holds_part)
    stack.callback(facts.close)
    stack.callback(public.close)
    stack.callback(table.close)
    verified = Verified(folder / "signatures.sqlite")
    stack.callback(verified.close)
    return Storage(tiers, memory, disk, facts=facts, pins=pins, public=public, table=table, verified=verified)


def blocks(
    identity: Identity,
    view: View,
    exchange: Exchange,
    tiers: Tiers,
    *,
    upstream: batching.BlockRanges,
    nursery: trio.Nursery,
    config: Config | None = None,
    facts: ObjectFacts | None = None,
    news: RegistryNews | None = None,
    is_busy: Callable[[], bool] = lambda: False,
) -> Blocks:
    """Tasks that outlive a request run in `nursery`. `facts` None: they are kept in memory only. `news` None: nothing
    is known of the registries. `is_busy` as for `WholeReads`."""
    own, directory, config = identity.peer_id, Directory(), config or Config()
    peers, max_object = config.peers, config.mirror.max_object.bytes
    reads = BatchedReads(upstream, nursery, sharing=lambda: len(view.site))
    placement, trust = CurrentPlacement(view, peers.k, peers.m), Trust(own, view)
    facts = facts or ObjectFacts(holds=tiers.holds_part)
    site = Site(
        *(own, view, placement, exchange),
        health=Health(),
        trust=trust,
        tiers=tiers,
        facts=facts,
        max_object=max_object,
        nursery=nursery,
        storing=Storing(nursery),
    )
    news = news or NoNews()
    questions, grants = Questions(site, news), Grants()
    holders = Holders(site, questions, directory)
    home = Home(site, holders, grants, identity=identity, origin=reads, news=news)
    keeper = Keeper(site, home, questions, grants, identity=identity, news=news)
    inside = WholeReads(site, keeper, CodedReads(site, questions, keeper), is_busy)
    members = ChosenWay(inside, home, news, lambda: len(view.site))
    fetcher = Fetcher((HeldBlocks(tiers), members, home), nursery)
    return Blocks(site, directory, questions, grants, holders=holders, home=home, keeper=keeper, fetcher=fetcher)


def network(config: Config, admitted: Admitted) -> Network:
    peers, verifier, place = config.peers, admitted.verifier, admitted.place
    own = Member(admitted.identity.peer_id, config.node.name, place.site, bulk_addresses(peers.bulk))
    author = Author(own.peer_id, admitted.identity.sign, lambda: verifier.credentials.certificate)
    passports = Passports(author, verifier.subject_of, verifier.refusal)
    membership, dispatcher = Membership(own, int(time.time() * 1000), Random(), passports), Dispatcher()
    endpoint = Endpoint(
        verifier.server_context,
        verifier.client_context,
        verifier.peer_of,
        listen=peers.bulk,
        locate=membership.locate,
        refused=membership.is_refused,
        handler=dispatcher,
        server=dispatcher.stream,
        at_once=dispatcher.at_once,
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
        named=membership.named,
        passports=passports,
    )
    return Network(membership, TlsExchange(endpoint), dispatcher, introducer, metrics=Metrics())


def site(
    config: Config,
    identity: Identity,
    membership: Membership,
    exchange: Exchange,
    *,
    tiers: Tiers,
    upstreams: Upstreams,
    names: KnownNames,
    revocations: Revocations,
    metrics: Metrics,
    nursery: trio.Nursery,
    rng: Random,
    facts: ObjectFacts | None = None,
    public_age: Callable[[Locator], float | None] = lambda locator: None,
    is_busy: Callable[[], bool] = lambda: False,
    hashing: Hashing = inline,
) -> Participant:
    """Build a member over `exchange`. It answers requests after `Participant.route`; its tasks are `services`."""
    made = partial(blocks, upstream=upstreams, nursery=nursery, config=config, facts=facts)
    parts = made(identity, membership, exchange, tiers, news=upstreams, is_busy=is_busy)
    near, home, questions, served = parts.site, parts.home, parts.questions, metrics.tag_served
    resolver = Resolver(
        near, names, upstreams, questions=questions, home=home, nursery=nursery, served=served, public_age=public_age
    )
    judge = Judge(
        site=near,
        findings=Findings(near, home, questions, lambda upstream: len(upstreams.endpoints(upstream)) > 1),
        questions=questions,
        sign=identity.sign,
        nursery=nursery,
        rng=rng,
    )
    announcer, ledger = Announcer(near, questions, parts.directory, membership, trim=names.trim), Provenance()
    verifier = ObjectVerifier(near, home, parts.fetcher, announcer.finished)
    library = SiteLibrary(
        site=near,
        resolver=resolver,
        grants=parts.grants,
        fetcher=parts.fetcher,
        verifier=verifier,
        ledger=ledger,
        metrics=metrics,
        hashing=hashing,
    )
    return Participant(
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


async def registry(config: Config, network: Network, storage: Storage, stack: AsyncExitStack) -> Registry:
    def sharing() -> int:
        return len(network.membership.site)

    uplinks = {part.name: Uplink(part.name, uplink_policy(part), sharing=sharing) for part in config.upstream}
    upstreams = Upstreams(
        config.upstream,
        count=network.metrics.origin,
        rng=Random(),
        uplinks=uplinks.values(),
        public=storage.public.note,
        max_object=config.mirror.max_object.bytes,
    )
    return Registry(await stack.enter_async_context(upstreams), uplinks, sharing)


def participant(
    config: Config, admitted: Admitted, storage: Storage, network: Network, *, registry: Registry, nursery: trio.Nursery
) -> Participant:
    load = ProcessorLoad()
    member = site(
        config,
        admitted.identity,
        network.membership,
        network.exchange,
        tiers=storage.tiers,
        facts=storage.facts,
        upstreams=registry.upstreams,
        names=KnownNames(
            storage.table, tag_policies(config), pinned=storage.pins.names, max_object=config.mirror.max_object.bytes
        ),
        revocations=admitted.revocations,
        metrics=network.metrics,
        nursery=nursery,
        rng=Random(),
        public_age=storage.public.age,
        is_busy=lambda: load.is_busy() and network.exchange.links_are_fast(),
        hashing=HashingThread(),
    )
    member.route(network.dispatcher, admitted.registrar)
    return member


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
    upstreams = registry.upstreams
    access = Access(
        access_grace_s(config),
        upstreams,
        storage.public,
        storage.facts,
        site_says=member.resolver.public_age_s,
        nursery=nursery,
        public_grace_s=tag_max_age_s,
        loopback=config.mirror.listen.is_loopback,
    )
    listings = Listings(upstreams.passthrough, member.library, folder / "listings.sqlite", tag_max_age_s)
    library = SignedLibrary(member.library, listings.referrers, load_keys(config.tags), storage.verified)
    prefetcher = Prefetcher(
        folder / "prefetch.json",
        library=library,
        verifier=member.verifier,
        fetcher=member.blocks.fetcher,
        holds=storage.tiers.holds,
        holds_all=partial(holds_all, storage.tiers),
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
    return Clients(access, library, listings, mirror, prefetcher=prefetcher, images=images)


def operator(node: Node, config: Config, path: Path | None, notifier: Notifier) -> tuple[Reloader, list[Route]]:
    """The reloader of `config`, which was read from `path`, and the routes of the control socket."""
    reloader = Reloader(path, config, partial(prepared, node), notifier)
    _watch(node, reloader)
    routes = [
        *control_routes(NodeControl(reloader, node)),
        *image_routes(node.clients.images),
        *cluster_routes(node.member.gossiper, node.admitted.revocations),
        *reloader.routes(),
    ]
    return reloader, routes


def services(node: Node, folder: Path) -> list[Callable[..., Awaitable[None]]]:
    """The tasks of a node, for `nursery.start` in this order: files of earlier runs before the tasks that use them."""
    admitted, member, joined = node.admitted, node.member, node.admitted.place.joined
    membership, exchange, verifier = member.membership, member.exchange, admitted.verifier
    save, renewed = partial(save_joined, folder), membership.renewed
    return [
        UplinkFile(folder / "uplink.msgpack", node.registry.uplinks.values()).run,
        partial(PeersFile(folder / "peers.msgpack").run, membership),
        partial(EvidenceFile(folder / "evidence.msgpack").run, membership, member.judge.cases),
        *member.services,
        partial(verifier.watch, exchange.disconnect),
        *(
            [Renewal(verifier, joined, membership, exchange, save=save, renewed=renewed, rng=Random()).run]
            if joined
            else []
        ),
        member.verifier.run,
        node.network.introducer.run,
        node.clients.prefetcher.run,
    ]


def _watch(node: Node, reloader: Reloader) -> None:
    ledger, membership, exchange = node.member.ledger, node.member.membership, node.network.exchange
    node.network.metrics.watch(
        bytes_served=lambda: ledger.bytes_served,
        requests=lambda: ledger.requests,
        peer_bytes=lambda: {"sent": exchange.statistics().bytes_sent, "received": exchange.statistics().bytes_received},
        disk_written_bytes=written_bytes,
        tasks=lambda: trio.lowlevel.current_statistics().tasks_living,
        peers_alive=lambda: len(membership.site) - 1,
        peers_quarantined=lambda: sum(bool(row.quarantine) for row in membership.table()),
        **cache_metrics(node.storage.tiers.statistics),
        **upstream_metrics(lambda: [upstream_row(part, node.registry.upstreams) for part in reloader.config.upstream]),
    )
