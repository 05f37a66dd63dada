"""p2pd: everything is constructed here, once, and runs in one nursery.

The order is that of need: what is stored, who takes part, what carries requests, what answers them, what clients see.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import click
import trio

from cache.content_store import ContentStore
from cache.disk import DiskStore
from cache.memory import MemoryStore
from cache.tiered import Tiers
from node.blocks.announcer import Announcer
from node.blocks.fetcher import Fetcher
from node.blocks.keeper import Seeder
from node.blocks.trust import Trust
from node.blocks.values import Site
from node.config.schema import (
    Config,
    HostPort,
    access_grace_s,
    check,
    load,
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
from node.control.routes import METRICS_LIMITS, metrics_handler, serve_control
from node.evidence.judge import Judge
from node.evidence.judge_file import EvidenceFile
from node.exchange.connection import Endpoint
from node.exchange.contract import Answer
from node.exchange.tls import TlsExchange
from node.identity.credentials import save_joined, standing
from node.identity.identity import Identity, load_or_create
from node.identity.registrar import FILE_NAME as TOKENS
from node.identity.registrar import Registrar, Uses
from node.identity.revocations import FILE_NAME as REVOCATIONS
from node.identity.revocations import Revocations
from node.identity.verifier import Admission
from node.images.operations import Offline, OfflineParts
from node.images.pins import Pins, digests_of, load_pins
from node.images.prefetch import Prefetcher
from node.membership.addresses import bulk_addresses
from node.membership.gossip import Gossiper
from node.membership.libp2p import LibP2PSwarm
from node.membership.membership import Membership
from node.membership.peers_file import RememberedPeers
from node.membership.renewal import Renewal
from node.membership.view import View
from node.mirror import mirror as mirror_module
from node.mirror.access import Access, PublicTable
from node.mirror.mirror import Mirror
from node.registry.batching import Origin
from node.registry.uplink import Uplink, UplinkFile
from node.registry.upstreams import Upstreams
from node.runtime.allocator import tune_allocator
from node.runtime.disk_writes import written_bytes
from node.runtime.logs import configure
from node.runtime.systemd import Notifier
from node.runtime.version import version
from node.telemetry.metrics import Metrics
from node.telemetry.provenance import Ledger
from node.web.server import Handler, Limits, serve_http
from protocol.directory import Directory
from protocol.errors import BadInputError
from protocol.health import Health
from protocol.ids import Digest, ObjectRef, PeerId
from protocol.members import Member
from protocol.messages import Accuse, Ping, PingRequest, Renew, Request, Resolve, Sync
from protocol.placement import Placement
from protocol.records import Record, make_record

log = logging.getLogger(__name__)

STOP_S = 15.0
"""For running bodies to end, the index to be written and the members to be told; systemd is given longer."""


class CurrentPlacement:
    """The placement for the view as it is now, made anew when the view has changed."""

    def __init__(self, view: View, k: int, m: int) -> None:
        self._view, self._k, self._m = view, k, m
        self._version = -1
        self._placement = Placement(view.site, k, m)

    def __call__(self) -> Placement:
        if self._version != self._view.version:
            self._version = self._view.version
            self._placement = Placement(self._view.site, self._k, self._m)
        return self._placement


@dataclass(slots=True)
class Dispatcher:
    """Which part answers which request of a member."""

    membership: Gossiper
    names: Names
    seeder: Seeder
    registrar: Registrar
    judge: Judge

    async def __call__(self, peer: PeerId, request: Request) -> Answer:
        match request:
            case Accuse():
                return await self.judge.handle(peer, request)
            case Ping() | PingRequest() | Sync():
                return await self.membership.handle(peer, request)
            case Renew():
                return await self.registrar.handle(peer, request)
            case Resolve():
                return await self.names.handle(request)
            case _:
                return await self.seeder.handle(peer, request)


class _Late:
    """The exchange is built before what answers its requests is; it serves nothing until that is there."""

    target: Dispatcher

    async def __call__(self, peer: PeerId, request: Request) -> Answer:
        return await self.target(peer, request)


async def _listeners(address: HostPort, key: str) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as error:
        raise BadInputError(f'{key} = "{address}": cannot listen there: {error.strerror or error}') from error


def _data_dir(config: Config) -> Path:
    path = Path(config.node.data_dir)
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o750)
    except OSError as error:
        raise BadInputError(f"node.data_dir: cannot make {path}: {error.strerror}") from error
    return path


def _record_for(identity: Identity) -> Callable[[ObjectRef, int, bytes], Record]:
    def record_for(ref: ObjectRef, index: int, sha: bytes) -> Record:
        return make_record(ref, index, sha, identity.peer_id, identity.sign)

    return record_for


async def run(config: Config, path: Path | None, notifier: Notifier, stop: trio.Event) -> None:
    """The node, until `stop` is set. `path` is where the configuration is from, and is read again at SIGHUP.

    Raises BadInputError where the configuration cannot be carried out.
    """
    started_at = trio.current_time()
    data_dir = _data_dir(config)
    identity = load_or_create(data_dir)
    place = standing(config, data_dir, identity)
    revocations = Revocations(data_dir / REVOCATIONS, place.credentials.authority)
    admission = Admission(place.credentials, revocations)
    registrar = Registrar(place.authority, revocations, Uses(data_dir / TOKENS))
    metrics, ledger, health, directory = Metrics(), Ledger(), Health(), Directory()
    async with AsyncExitStack() as stack:
        hang_ups = stack.enter_context(trio.open_signal_receiver(signal.SIGHUP))
        mirror_listeners = await _listeners(parse_host_port(config.mirror.listen, "mirror.listen"), "mirror.listen")
        loaded_pins = load_pins(data_dir / "pins.json")
        tiers, memory, disk = await _open_tiers(config, data_dir, identity, digests_of(loaded_pins), stack)
        pins = Pins(data_dir / "pins.json", loaded_pins, disk)
        public = PublicTable(data_dir / "access.sqlite", pins.has_of)
        stack.callback(public.close)
        bulk = parse_host_port(config.peers.bulk, "peers.bulk")
        own = Member(identity.peer_id, config.node.name, place.site, bulk_addresses(bulk))
        membership = Membership(own, int(time.time() * 1000), Random())
        uplinks = {
            part.name: Uplink(part.name, uplink_policy(part), sharing=lambda: len(membership.site))
            for part in config.upstream
        }

        def uplink_of(name: str) -> Uplink:
            return uplinks.setdefault(name, Uplink(name, sharing=lambda: len(membership.site)))

        upstreams = await stack.enter_async_context(
            Upstreams(config.upstream, count=metrics.origin, rng=Random(), uplinks=uplinks.values(), public=public.note)
        )
        table = NameTable(data_dir / "names.sqlite")
        stack.callback(table.close)
        work = await stack.enter_async_context(trio.open_nursery())
        stack.callback(work.cancel_scope.cancel)

        answers = _Late()
        endpoint = Endpoint(
            admission.server_context,
            admission.client_context,
            admission.peer_of,
            listen=bulk,
            locate=membership.find,
            refused=membership.is_refused,
            handler=answers,
            plain=config.peers.plain,
        )
        exchange = TlsExchange(endpoint)
        service = Gossiper(membership, exchange, revocations)
        site = Site(
            identity.peer_id,
            membership,
            CurrentPlacement(membership, config.peers.k, config.peers.m),
            exchange,
            health,
            Trust(identity.peer_id, membership),
            tiers,
        )
        seeder = Seeder(site, Origin(upstreams, work, lambda: len(membership.site)), directory, identity.sign, work)
        names = Names(
            site, table, upstreams, seeder, work, tag_policies(config), metrics.tag_served, public.age, pins.names
        )
        access = Access(
            access_grace_s(config), upstreams, public, names.public_age_s, work,
            public_grace_s=parse_duration(config.mirror.tag_max_age, "mirror.tag_max_age"),
            loopback=parse_host_port(config.mirror.listen, "mirror.listen").is_loopback,
        )  # fmt: skip
        judge = Judge(
            site, seeder, identity.sign, lambda upstream: len(upstreams.endpoints(upstream)) > 1, work, Random()
        )
        answers.target = Dispatcher(service, names, seeder, registrar, judge)
        announcer = Announcer(site, seeder, directory, membership, table.trim)
        fetcher = Fetcher(site, seeder, work)
        library = SiteLibrary(site, names, seeder, fetcher, ledger, metrics, announcer.finished)
        prefetcher = Prefetcher(data_dir / "prefetch.json", library, fetcher, tiers.holds)
        offline = Offline(
            OfflineParts(
                site,
                disk,
                library,
                table,
                pins,
                prefetcher,
                upstreams.names,
                _record_for(identity),
                announcer.finished,
                public.note,
            )
        )
        swarm = LibP2PSwarm(
            admission,
            lambda: membership.own,
            joins=registrar.serve,
            listen=config.peers.listen,
            bootstrap=[*config.peers.bootstrap, *place.bootstrap],
            mdns=config.peers.mdns,
            introduced=membership.introduced,
            current=membership.current,
        )
        listings = Listings(
            upstreams.passthrough, library, data_dir / "listings.sqlite",
            parse_duration(config.mirror.tag_max_age, "mirror.tag_max_age"),
        )  # fmt: skip
        stack.callback(listings.close)
        live = LiveParts(
            upstreams, uplink_of, names, access, listings, lambda more: swarm.prepared([*more, *place.bootstrap]),
            pins, memory, disk,
        )  # fmt: skip
        reloader = Reloader(path, config, live.prepared, notifier)
        control = NodeControl(
            Parts(
                lambda: reloader.config, site, membership, judge, swarm, exchange, names, upstreams, library, ledger,
                metrics, config.mirror.listen, started_at, lambda: cluster_row(admission, revocations, place),
                lambda: certificate_shown(reloader.config, admission, revocations), len(place.bootstrap),
            )
        )  # fmt: skip
        metrics.watch_served(
            lambda: {source.value: count for source, count in ledger.bytes_served.items()},
            lambda: {source.value: count for source, count in ledger.requests.items()},
        )
        metrics.watch_members_traffic(
            lambda: {"sent": exchange.statistics().bytes_sent, "received": exchange.statistics().bytes_received}
        )
        metrics.watch_cache(tiers.statistics)
        metrics.watch_wear(written_bytes)
        metrics.watch_tasks(lambda: trio.lowlevel.current_statistics().tasks_living)
        metrics.watch_members(
            lambda: len(membership.site) - 1, lambda: sum(bool(row.quarantine) for row in membership.table())
        )
        metrics.watch_upstreams(lambda: [upstream_row(part, upstreams) for part in reloader.config.upstream])

        await work.start(UplinkFile(data_dir / "uplink.msgpack", uplinks.values()).run)
        await work.start(exchange.run)
        await work.start(service.run)
        await work.start(admission.watch, exchange.disconnect)
        if place.joined is not None:
            save = partial(save_joined, data_dir)
            await work.start(Renewal(admission, place.joined, membership, exchange, save, Random()).run)
        await work.start(partial(RememberedPeers(data_dir / "peers.msgpack").run, membership))
        await work.start(partial(EvidenceFile(data_dir / "evidence.msgpack").run, membership, judge))
        await work.start(judge.run)
        await work.start(announcer.run)
        await work.start(library.check_parts)
        await work.start(swarm.run)
        await work.start(prefetcher.run)
        routes = {**offline_routes(offline), **admission_routes(service, revocations), **reloader.routes()}
        await work.start(partial(serve_control, control, Path(config.control.socket), routes))
        if config.control.metrics:
            address = parse_host_port(config.control.metrics, "control.metrics")
            await _serve(
                work, await _listeners(address, "control.metrics"), metrics_handler(metrics), METRICS_LIMITS, None
            )
        handler = Mirror(library, upstreams.names, listings, access).handle
        async with trio.open_nursery() as serving:
            await _serve(serving, mirror_listeners, handler, mirror_module.LIMITS, stop)
            await work.start(notifier.watchdog)
            work.start_soon(reloader.on_signals, hang_ups)
            notifier.ready(f"mirror on {config.mirror.listen}")
            log.info("ready", extra={"mirror": config.mirror.listen, "peer_id": identity.peer_id})
            await stop.wait()
            notifier.stopping()
            log.info("stopping")
        with trio.move_on_after(STOP_S):
            await service.leave()
        work.cancel_scope.cancel()
    log.info("stopped")


async def _serve(
    nursery: trio.Nursery,
    listeners: list[trio.SocketListener],
    handler: Handler,
    limits: Limits,
    stop: trio.Event | None,
) -> None:
    await nursery.start(partial(serve_http, listeners, handler, limits=limits, stop=stop))


async def _open_tiers(
    config: Config, data_dir: Path, identity: Identity, pinned: frozenset[Digest], stack: AsyncExitStack
) -> tuple[Tiers, MemoryStore, DiskStore]:
    share, least = parse_floor(config.cache.min_free, "cache.min_free")
    budget = parse_size(config.cache.disk, "cache.disk")
    disk = await stack.enter_async_context(
        DiskStore.open(data_dir / "cache", budget, free_share=share, free_bytes=least, pinned=pinned)
    )
    memory = MemoryStore(parse_size(config.cache.memory, "cache.memory"), trio.current_time)
    folder = config.cache.containerd_store
    content = ContentStore(Path(folder), record_for=_record_for(identity)) if folder else None
    return Tiers(memory, disk, content), memory, disk


async def _run_until_signal(config: Config, path: Path | None) -> None:
    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:

        async def watch() -> None:
            async for _ in signals:
                stop.set()
                return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await run(config, path, Notifier(), stop)
            nursery.cancel_scope.cancel()


@click.command()
@click.option("--config", "path", type=click.Path(path_type=Path), help="The configuration file (TOML).")
@click.option("--print-peer-id", is_flag=True, help="Print this node's peer id, making its key if need be, and exit.")
@click.version_option(version(), prog_name="p2pd")
def main(path: Path | None, print_peer_id: bool) -> None:
    """Serve a pull-through registry mirror that shares blocks with the other nodes of its site."""
    try:
        config = load(path)
        check(config)
        if print_peer_id:
            click.echo(load_or_create(_data_dir(config)).peer_id)
        else:
            configure(config.node.log)
            tune_allocator()
            gc.freeze()  # what was imported stays: without this each full collection looks at all of it for 80 ms
            trio.run(_run_until_signal, config, path)
    except* BadInputError as group:
        for error in _leaves(group):
            click.echo(f"p2pd: {error}", err=True)
        sys.exit(2)


def _leaves(group: BaseExceptionGroup[BadInputError]) -> list[BaseException]:
    """The errors themselves, out of the nurseries that they came through."""
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


if __name__ == "__main__":
    main()
