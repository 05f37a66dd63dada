"""`ControlApi` over the running node: reads its components and makes the documents that the control socket sends."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import httpx
import trio

from cache.store import Holdings, StoreStatistics
from node.api.documents import (
    BulkTotals,
    CachedObject,
    CacheReport,
    ClusterRow,
    DoctorReport,
    EndpointRow,
    EvidenceRow,
    ImageRow,
    ImagesReport,
    PeerHealth,
    PeerRow,
    PeersReport,
    PullEvent,
    PullProgress,
    PullResult,
    Status,
    TagRow,
    TagsReport,
    TagState,
    TierRow,
    UplinkRow,
    UpstreamRow,
    Wear,
    WhyBlock,
    WhyReport,
    why_object,
    why_report,
)
from node.blocks.values import Site
from node.config.schema import Config, UpstreamPart
from node.config.tag_policy import TagPolicy
from node.content.image_walk import MAX_DEPTH
from node.content.library import SiteLibrary
from node.content.name_table import REGISTRY, KnownTag
from node.content.resolver import Names
from node.control.doctor import Facts, Shown, disk_space, examine, probe_upstreams, writable_error
from node.evidence.judge import Case, Judge
from node.exchange.tls import TlsExchange
from node.membership.introduction import Swarm
from node.membership.membership import Membership, Row
from node.oci.manifests import MAX_MANIFEST, Manifest, Resolved, descriptors, parse_manifest
from node.oci.platforms import own_platform
from node.oci.references import ImageName, Locator
from node.registry.upstreams import Upstreams
from node.runtime.disk_writes import written_bytes
from node.runtime.version import version
from node.telemetry.metrics import Metrics
from node.telemetry.provenance import Ledger
from node.telemetry.sources import Source
from protocol.errors import NotFoundError, ShoalError
from protocol.ids import Digest, ObjectRef, PeerId, Piece
from protocol.members import State

PROGRESS_EVERY_S = 0.2
MAX_CACHE_ROWS = 1000
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The components that an operator may ask about. `issuers` counts the members through which this node joined."""

    config: Callable[[], Config]
    site: Site
    membership: Membership
    judge: Judge
    swarm: Swarm
    exchange: TlsExchange
    names: Names
    upstreams: Upstreams
    library: SiteLibrary
    ledger: Ledger
    metrics: Metrics
    mirror_address: str
    started_at: float
    cluster: Callable[[], ClusterRow]
    certificate: Callable[[], Shown]
    issuers: int


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * _PAGE


class NodeControl:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def status(self) -> Status:
        parts = self._parts
        traffic = parts.exchange.statistics()
        return Status(
            name=parts.membership.own.name,
            site=parts.membership.own.site,
            peer_id=parts.site.own,
            addresses=parts.swarm.addresses,
            uptime_s=trio.current_time() - parts.started_at,
            version=version(),
            ready=True,
            peers_alive=len(parts.membership.site) - 1,
            bytes_served=_by_name(parts.ledger.bytes_served),
            requests=_by_name(parts.ledger.requests),
            cache=_tier_rows(parts.site.tiers.statistics()),
            origin_bytes=parts.metrics.origin_bytes(),
            rss_bytes=rss_bytes(),
            bulk=BulkTotals(bytes_sent=traffic.bytes_sent, bytes_received=traffic.bytes_received),
            mirror=parts.mirror_address,
            wear=self._wear(),
            upstreams=tuple(upstream_row(part, parts.upstreams) for part in parts.config().upstream),
            cluster=parts.cluster(),
        )

    def _wear(self) -> Wear:
        served = sum(self._parts.ledger.bytes_served.values()) + self._parts.exchange.statistics().bytes_sent
        return Wear(written_bytes=written_bytes(), served_bytes=served)

    async def peers(self) -> PeersReport:
        rows = (row for row in self._parts.membership.table() if row.member.peer_id != self._parts.site.own)
        return PeersReport(peers=tuple(self._peer_row(row) for row in rows))

    def _peer_row(self, row: Row) -> PeerRow:
        peer = row.member.peer_id
        health = self._parts.site.health.report(peer, trio.current_time())
        traffic = self._parts.exchange.statistics().traffic.get(peer)
        state = {State.ALIVE: "alive", State.SUSPECT: "suspect", State.DEAD: "dead", State.LEFT: "left"}[row.state]
        return PeerRow(
            peer_id=peer,
            name=row.member.name,
            site=row.member.site,
            state=state,  # type: ignore[arg-type] # one of the four literals above
            addresses=row.member.addresses,
            since_s=row.since_s,
            rtt_ms=None if row.rtt_s is None else row.rtt_s * 1000,
            health=PeerHealth(latency_ms=health.mean_s * 1000, failures=health.failures),
            bytes_received=traffic.received if traffic else 0,
            bytes_sent=traffic.sent if traffic else 0,
            quarantine=row.quarantine,
            evidence=tuple(self._evidence_row(case) for case in self._parts.judge.about(peer)),
        )

    def _evidence_row(self, case: Case) -> EvidenceRow:
        evidence = case.evidence
        finder = self._parts.membership.find(evidence.finder)
        return EvidenceRow(
            block=f"{evidence.record.digest}#{evidence.record.index}",
            source=evidence.source,
            found_by=finder.name if finder else evidence.finder,
            found_by_id=evidence.finder,
            age_s=trio.current_time() - case.found_at,
            verdict=case.verdict.value,
            contradicted=evidence.other is not None,
        )

    async def images(self) -> ImagesReport:
        rows: dict[str, ImageRow] = {}
        for source, reference, resolved in self._parts.names.images():
            locator = Locator.parse(source)
            image = str(ImageName(locator.upstream, locator.repository, reference))
            manifest = await self._held_manifest(resolved.ref)
            # A platform's manifest is part of its tag's row; it has a row of its own if it was requested by digest.
            if manifest is not None and image not in rows:
                rows[image] = await self._image_row(image, reference, resolved, manifest)
        return ImagesReport(images=tuple(rows.values()))

    async def _image_row(self, image: str, reference: str, resolved: Resolved, manifest: Manifest) -> ImageRow:
        objects = {part.ref.digest: part.ref for part in [resolved, *await self._below(manifest)]}
        held = sum(self._bytes_held(ref) for ref in objects.values())
        size = sum(ref.size for ref in objects.values())
        return ImageRow(
            image=image,
            digest=str(resolved.ref.digest),
            media_type=resolved.media_type,
            size=size,
            bytes_held=held,
            complete=held == size,
            layers=len(manifest.layers),
            age_s=None if ":" in reference else resolved.age_s,
        )

    async def _below(self, manifest: Manifest, depth: int = 0) -> list[Resolved]:
        """The objects that a manifest lists; for an index, those of each of its manifests that this node holds."""
        objects = list(descriptors(manifest, "blobs"))
        for descriptor in descriptors(manifest, "manifests"):
            inner = await self._held_manifest(descriptor.ref)
            if inner is not None and depth < MAX_DEPTH:
                objects += [descriptor, *await self._below(inner, depth + 1)]
        return objects

    async def _held_manifest(self, ref: ObjectRef) -> Manifest | None:
        if ref.size > MAX_MANIFEST:
            return None
        parts = []
        for index in range(ref.block_count):
            held = await self._parts.site.tiers.get(Piece(ref.block(index)), ref.size)
            if held is None:
                return None
            parts.append(bytes(held[0].data))
        return parse_manifest(b"".join(parts))

    def _bytes_held(self, ref: ObjectRef) -> int:
        bits = self._parts.site.tiers.holdings(ref.digest).blocks
        return sum(ref.block_length(index) for index in range(ref.block_count) if bits >> index & 1)

    async def tags(self, pattern: str) -> TagsReport:
        return TagsReport(tags=tuple(self._tag_row(*row) for row in self._parts.names.tags(pattern)))

    def _tag_row(self, tag: KnownTag, policy: TagPolicy, state: TagState) -> TagRow:
        member = self._parts.membership.find(PeerId(tag.told_by)) if tag.told_by not in ("", REGISTRY) else None
        return TagRow(
            tag=str(ImageName(tag.locator.upstream, tag.locator.repository, tag.tag)),
            digest=str(tag.resolved.ref.digest),
            age_s=tag.resolved.age_s,
            state=state,
            source="registry" if tag.told_by == REGISTRY else "member" if tag.told_by else "remembered",
            told_by="" if tag.told_by == REGISTRY else member.name if member else tag.told_by,
            rule=policy.match,
            ttl_s=policy.ttl_s,
            max_age_s=policy.max_age_s,
            cache=policy.cached,
        )

    async def cache(self) -> CacheReport:
        tiers = self._parts.site.tiers
        rows: list[CachedObject] = []
        for tier, store in tiers.stores.items():
            for digest in store.objects():
                pinned = tier == "disk" and tiers.is_pinned(digest)
                rows.append(_cached(digest, tier, store.holdings(digest), pinned=pinned))
                if len(rows) >= MAX_CACHE_ROWS:
                    break
        return CacheReport(tiers=_tier_rows(tiers.statistics()), objects=tuple(rows), wear=self._wear())

    async def why(self, image: ImageName) -> WhyReport:
        resolved = self._parts.names.known(image.manifests, image.reference)
        manifest = await self._held_manifest(resolved.ref) if resolved else None
        if resolved is None or manifest is None:
            raise NotFoundError(f"{image} was not pulled through this node")
        objects = {part.ref.digest: part for part in [resolved, *await self._below(manifest)]}
        listed = [why_object(part.ref, part.media_type, self._why_blocks(part.ref)) for part in objects.values()]
        return why_report(str(image), str(resolved.ref.digest), listed)

    def _why_blocks(self, ref: ObjectRef) -> Mapping[int, WhyBlock]:
        return {
            index: WhyBlock(
                index=index,
                length=ref.block_length(index),
                source=read.source.value,
                peers=read.peers,
                milliseconds=read.seconds * 1000,
                retries=read.retries,
                when=read.at,
            )
            for index, read in self._parts.ledger.reads(ref.digest).items()
            if index < ref.block_count
        }

    async def pull(self, image: ImageName, *, all_platforms: bool) -> AsyncGenerator[PullEvent, None]:
        pull = _Pull(self._parts, image, all_platforms)
        try:
            async with aclosing(pull.run()) as progress:
                async for event in progress:
                    yield event
        except ShoalError as error:
            yield pull.result(str(error))
        else:
            yield pull.result("")

    async def doctor(self) -> DoctorReport:
        parts = self._parts
        config = parts.config()
        data_dir = Path(config.node.data_dir)
        async with httpx.AsyncClient(verify=True) as client:
            themselves = {part.name: part.urls[-1] for part in config.upstream}
            mirrors = {f"{part.name} by {url}": url for part in config.upstream for url in part.urls[:-1]}
            probes = await probe_upstreams(client, themselves | mirrors)
        error = await trio.to_thread.run_sync(writable_error, data_dir)
        free, total = disk_space(data_dir)
        now = trio.current_time()
        others = [member for member in parts.membership.site if member.peer_id != parts.site.own]
        facts = Facts(
            upstreams={name: probes[name] for name in themselves},
            mirrors={name: probes[name] for name in mirrors},
            spent=[part.name for part in config.upstream if parts.upstreams.uplink(part.name).spent],
            alive=len(others),
            bootstrap=len(config.peers.bootstrap) + parts.issuers,
            mdns=config.peers.mdns,
            quarantined={row.member.name: row.quarantine for row in parts.membership.table() if row.quarantine},
            bulk_unreachable=[member.name for member in others if parts.site.health.avoided(member.peer_id, now)],
            data_dir=data_dir,
            data_dir_error=error,
            free_bytes=free,
            total_bytes=total,
            floor=config.cache.min_free,
            certificate=await trio.to_thread.run_sync(parts.certificate),
            now=time.time(),
        )
        return examine(facts)


class _Pull:
    """One image into this node's cache, without a client."""

    def __init__(self, parts: Parts, image: ImageName, all_platforms: bool) -> None:
        self._parts, self._image, self._all = parts, image, all_platforms
        self._since = trio.current_time()
        self._before = _by_name(parts.ledger.bytes_served)
        self._done = self._total = 0
        self._digest = ""
        self._told = 0.0

    async def run(self) -> AsyncGenerator[PullProgress, None]:
        yield self._progress("resolving", "")
        locator = self._image.manifests
        found = await self._parts.library.resolve(locator, self._image.reference)
        self._digest = str(found.ref.digest)
        pending = [(locator, found)]
        seen = {found.ref.digest}
        self._total = found.ref.size
        while pending:
            where, one = pending.pop(0)
            body = bytearray()
            async with aclosing(self._parts.library.read(where, one.ref, 0, one.ref.size)) as chunks:
                async for chunk in chunks:
                    self._done += len(chunk)
                    if where.kind == "manifests" and one.ref.size <= MAX_MANIFEST:
                        body += chunk
                    if trio.current_time() - self._told >= PROGRESS_EVERY_S:
                        yield self._progress("pulling", str(one.ref.digest))
            for following in self._following(where, body):
                if following[1].ref.digest not in seen:
                    seen.add(following[1].ref.digest)
                    self._total += following[1].ref.size
                    pending.append(following)
        yield self._progress("pulling", self._digest)

    def _following(self, where: Locator, body: bytearray) -> Iterator[tuple[Locator, Resolved]]:
        manifest = parse_manifest(bytes(body)) if body else Manifest()
        wanted = {one.digest for one in manifest.manifests if self._all or own_platform().fits(one.platform)}
        for one in descriptors(manifest, "manifests"):
            if str(one.ref.digest) in wanted or len(manifest.manifests) == 1:
                yield where.of_kind("manifests"), one
        for one in descriptors(manifest, "blobs"):
            yield where.of_kind("blobs"), one

    def _by_source(self) -> dict[str, int]:
        now = _by_name(self._parts.ledger.bytes_served)
        return {source: now[source] - self._before[source] for source in now}

    def _progress(self, phase: str, digest: str) -> PullProgress:
        self._told = trio.current_time()
        return PullProgress(
            phase="resolving" if phase == "resolving" else "pulling",
            object=digest,
            bytes_done=self._done,
            bytes_total=self._total,
            by_source=self._by_source(),
        )

    def result(self, error: str) -> PullResult:
        return PullResult(
            ok=not error,
            image=str(self._image),
            seconds=trio.current_time() - self._since,
            digest=self._digest,
            error=error,
            bytes_total=self._total,
            by_source=self._by_source(),
        )


def _by_name(counts: Mapping[Source, int]) -> dict[str, int]:
    return {source.value: count for source, count in counts.items()}


def upstream_row(part: UpstreamPart, upstreams: Upstreams) -> UpstreamRow:
    """An upstream with the health of its URLs and the use of its uplink."""
    endpoints = (
        EndpointRow(url=place.url, problem=place.problem, retry_in_s=place.retry_in_s, bytes_received=place.received)
        for place in upstreams.endpoints(part.name)
    )
    use = upstreams.uplink(part.name)
    uplink = UplinkRow(rate=use.rate, daily_bytes=use.daily, used_today_bytes=use.used, free=use.free, spent=use.spent)
    return UpstreamRow(
        name=part.name,
        url=part.urls[-1],
        endpoints=tuple(endpoints),
        uplink=uplink if use.rate or use.daily else None,
    )


def _tier_rows(statistics: Mapping[str, StoreStatistics]) -> dict[str, TierRow]:
    return {
        tier: TierRow(
            bytes=row.bytes, budget_bytes=row.budget_bytes, entries=row.entries, pinned_bytes=row.pinned_bytes
        )
        for tier, row in statistics.items()
    }


def _cached(digest: Digest, tier: str, holdings: Holdings, *, pinned: bool) -> CachedObject:
    shards = sum(bits.bit_count() for bits in holdings.shards.values())
    blocks = holdings.blocks.bit_count()
    return CachedObject(digest=str(digest), tier=tier, blocks=blocks, shards=shards, pinned=pinned)
