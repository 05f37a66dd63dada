"""`ControlApi` for the running node: makes the documents that the control socket sends, from the node's parts."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from pathlib import Path

import httpx
import trio

from cache.store import Holdings, StoreStatistics
from node.api import documents as doc
from node.blocks.held_objects import bytes_held, held_body
from node.config.schema import UpstreamPart
from node.config.tag_policy import TagPolicy
from node.content.image_walk import walk
from node.content.name_table import KnownTag
from node.control.doctor import Facts, certificate_shown, disk_space, examine, probe_upstreams, writable_error
from node.control.reload import Reloader
from node.control.routes import cluster_row
from node.evidence.cases import Case
from node.images.pull import Pull, by_name
from node.membership.membership import Row
from node.oci.layout import Packed
from node.oci.manifests import MAX_MANIFEST, Resolved, parse_manifest
from node.oci.references import ImageName, Locator
from node.registry.upstreams import Upstreams
from node.runtime.disk_writes import written_bytes
from node.runtime.version import version
from node.stages import Node
from protocol.errors import NotFoundError
from protocol.ids import Digest, ObjectRef
from protocol.members import State
from protocol.ways import Way, Ways

MAX_CACHE_ROWS = 1000
MAX_NAMED = 8
"""Members that a row names: more would not fit on a line, and two decide by default."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * _PAGE


class NodeControl:
    def __init__(self, reloader: Reloader, node: Node) -> None:
        self._reloader, self._admitted, self._network, self._registry = (
            reloader,
            node.admitted,
            node.network,
            node.registry,
        )
        self._member, self._site, self._membership = node.member, node.member.blocks.site, node.member.membership
        self._library = node.clients.library
        self._started_at = trio.current_time()

    async def status(self) -> doc.Status:
        config, traffic = self._reloader.config, self._network.exchange.statistics()
        return doc.Status(
            name=self._membership.own.name,
            site=self._membership.own.site,
            peer_id=self._site.own,
            addresses=self._network.introducer.addresses,
            uptime_s=trio.current_time() - self._started_at,
            version=version(),
            ready=True,
            peers_alive=len(self._membership.site) - 1,
            bytes_served=by_name(self._member.ledger.bytes_served),
            requests=by_name(self._member.ledger.requests),
            cache=_tier_rows(self._site.tiers.statistics()),
            origin_bytes=self._network.metrics.origin_bytes(),
            rss_bytes=rss_bytes(),
            bulk=doc.BulkTotals(bytes_sent=traffic.bytes_sent, bytes_received=traffic.bytes_received),
            mirror=str(config.mirror.listen),
            wear=self._wear(),
            upstreams=tuple(upstream_row(part, self._registry.upstreams) for part in config.upstream),
            cluster=cluster_row(self._admitted),
        )

    def _wear(self) -> doc.Wear:
        served = sum(self._member.ledger.bytes_served.values()) + self._network.exchange.statistics().bytes_sent
        return doc.Wear(written_bytes=written_bytes(), served_bytes=served)

    async def peers(self) -> doc.PeersReport:
        rows = (row for row in self._membership.table() if row.member.peer_id != self._site.own)
        return doc.PeersReport(peers=tuple(self._peer_row(row) for row in rows))

    def _peer_row(self, row: Row) -> doc.PeerRow:
        peer = row.member.peer_id
        health = self._site.health.report(peer, trio.current_time())
        traffic = self._network.exchange.statistics().traffic.get(peer)
        state = {State.ALIVE: "alive", State.SUSPECT: "suspect", State.DEAD: "dead", State.LEFT: "left"}[row.state]
        return doc.PeerRow(
            peer_id=peer,
            name=row.member.name,
            site=row.member.site,
            state=state,  # type: ignore[arg-type] # one of the four literals above
            addresses=row.member.addresses,
            since_s=row.since_s,
            rtt_ms=None if row.rtt_s is None else row.rtt_s * 1000,
            health=doc.PeerHealth(latency_ms=health.mean_s * 1000, failures=health.failures),
            bytes_received=traffic.received if traffic else 0,
            bytes_sent=traffic.sent if traffic else 0,
            quarantine=row.quarantine,
            evidence=tuple(self._evidence_row(case) for case in self._member.judge.cases.about(peer)),
        )

    def _evidence_row(self, case: Case) -> doc.EvidenceRow:
        evidence = case.evidence
        finder = self._membership.find(evidence.finder)
        return doc.EvidenceRow(
            block=f"{evidence.record.digest}#{evidence.record.index}",
            source=evidence.source,
            found_by=finder.name if finder else evidence.finder,
            found_by_id=evidence.finder,
            age_s=trio.current_time() - case.found_at,
            verdict=case.verdict.value,
            contradicted=evidence.other is not None,
        )

    async def images(self) -> doc.ImagesReport:
        rows = []
        seen: set[str] = set()
        for source, reference, resolved in self._member.resolver.known.images():
            locator = Locator.parse(source)
            image = str(ImageName(locator.upstream, locator.repository, reference))
            # A platform's manifest is shown with the tag that leads to it, unless it was requested by its digest alone.
            if image not in seen and (objects := await self._held_image(resolved)):
                seen.add(image)
                rows.append(await self._image_row(image, reference, resolved, objects))
        return doc.ImagesReport(images=tuple(rows))

    async def _image_row(
        self, image: str, reference: str, resolved: Resolved, objects: Mapping[Digest, Packed]
    ) -> doc.ImageRow:
        tiers = self._site.tiers
        held = sum(bytes_held(tiers.holdings(digest), packed.ref) for digest, packed in objects.items())
        size = sum(packed.ref.size for packed in objects.values())
        return doc.ImageRow(
            image=image,
            digest=str(resolved.ref.digest),
            media_type=resolved.media_type,
            size=size,
            bytes_held=held,
            complete=held == size,
            layers=len(parse_manifest(await self._held_manifest(resolved) or b"").layers),
            age_s=None if ":" in reference else resolved.age_s,
        )

    async def _held_image(self, resolved: Resolved) -> Mapping[Digest, Packed]:
        """The objects of an image, as far as the manifests held here name them; empty if the first one is not held."""
        facts, objects = self._site.facts, await walk(resolved, self._held_manifest)
        return {packed.ref.digest: replace(packed, ref=facts.true(packed.ref)) for packed in objects}

    async def _held_manifest(self, resolved: Resolved) -> bytes | None:
        return await held_body(self._site.tiers, resolved.ref) if resolved.ref.size <= MAX_MANIFEST else None

    async def tags(self, pattern: str) -> doc.TagsReport:
        return doc.TagsReport(tags=tuple(self._tag_row(*row) for row in self._member.resolver.known.tags(pattern)))

    def _tag_row(self, tag: KnownTag, policy: TagPolicy, state: doc.TagState) -> doc.TagRow:
        members = ((peer, self._membership.find(peer)) for peer in tag.told_by[:MAX_NAMED])
        return doc.TagRow(
            tag=str(ImageName(tag.locator.upstream, tag.locator.repository, tag.tag)),
            digest=str(tag.resolved.ref.digest),
            age_s=tag.resolved.age_s,
            state=state,
            source="registry" if tag.origin == "manifest" else tag.origin,
            told_by=tuple(member.name if member else peer for peer, member in members),
            rule=policy.match,
            ttl_s=policy.ttl_s,
            max_age_s=policy.max_age_s,
            cache=policy.cached,
        )

    async def cache(self) -> doc.CacheReport:
        tiers = self._site.tiers
        rows: list[doc.CachedObject] = []
        for tier, store in tiers.stores.items():
            for digest in store.objects():
                pinned = tier == "disk" and tiers.is_pinned(digest)
                rows.append(_cached(digest, tier, store.holdings(digest), pinned=pinned))
                if len(rows) >= MAX_CACHE_ROWS:
                    break
        return doc.CacheReport(tiers=_tier_rows(tiers.statistics()), objects=tuple(rows), wear=self._wear())

    async def why(self, image: ImageName) -> doc.WhyReport:
        locator = image.manifests
        resolved = self._member.resolver.known.get(locator, image.reference)
        objects = await self._held_image(resolved) if resolved else {}
        if resolved is None or not objects:
            raise NotFoundError(f"{image} was not pulled through this node")
        listed = ((part.ref, part.media_type, self._why_blocks(part.ref)) for part in objects.values())
        return doc.why_report(str(image), str(resolved.ref.digest), listed)

    def _why_blocks(self, ref: ObjectRef) -> Mapping[int, doc.WhyBlock]:
        return {
            index: doc.WhyBlock(
                index=index,
                length=ref.block_length(index),
                source=read.source.value,
                peers=read.peers,
                milliseconds=read.seconds * 1000,
                retries=read.retries,
                when=read.at,
                way=read.way,
            )
            for index, read in self._member.ledger.reads(ref.digest).items()
            if index < ref.block_count
        }

    def pull(self, image: ImageName, *, all_platforms: bool) -> AsyncGenerator[doc.PullEvent, None]:
        return Pull(self._library, self._member.ledger, image, all_platforms=all_platforms).events()

    async def doctor(self) -> doc.DoctorReport:
        config = self._reloader.config
        data_dir = Path(config.node.data_dir)
        async with httpx.AsyncClient(verify=True) as client:
            themselves = {part.name: part.urls[-1] for part in config.upstream}
            mirrors = {f"{part.name} by {url}": url for part in config.upstream for url in part.urls[:-1]}
            probes = await probe_upstreams(client, themselves | mirrors)
        error = await trio.to_thread.run_sync(writable_error, data_dir)
        free, total = disk_space(data_dir)
        now = trio.current_time()
        others = [member for member in self._membership.site if member.peer_id != self._site.own]
        facts = Facts(
            upstreams={name: probes[name] for name in themselves},
            mirrors={name: probes[name] for name in mirrors},
            spent=[part.name for part in config.upstream if self._registry.upstreams.uplink(part.name).spent],
            alive=len(others),
            bootstrap=len(config.peers.bootstrap) + len(self._admitted.place.bootstrap),
            mdns=config.peers.mdns,
            quarantined={row.member.name: row.quarantine for row in self._membership.table() if row.quarantine},
            bulk_unreachable=[member.name for member in others if self._site.health.avoided(member.peer_id, now)],
            data_dir=data_dir,
            data_dir_error=error,
            free_bytes=free,
            total_bytes=total,
            floor=config.cache.min_free,
            certificate=await trio.to_thread.run_sync(certificate_shown, config, self._admitted),
            now=time.time(),
        )
        return examine(facts)


def upstream_row(part: UpstreamPart, upstreams: Upstreams) -> doc.UpstreamRow:
    """An upstream with the health of its URLs, the use of its uplink, and its two ways if one is chosen."""
    endpoints = tuple(
        doc.EndpointRow(url=end.url, problem=end.problem, retry_in_s=end.retry_in_s, bytes_received=end.received)
        for end in upstreams.endpoints(part.name)
    )
    use = upstreams.uplink(part.name)
    uplink = doc.UplinkRow(
        rate=use.rate, daily_bytes=use.daily, used_today_bytes=use.used, free=use.free, spent=use.spent
    )
    return doc.UpstreamRow(
        name=part.name,
        url=part.urls[-1],
        endpoints=endpoints,
        uplink=uplink if use.rate or use.daily else None,
        prefer=part.prefer,
        ways=_way_rows(upstreams.ways(part.name)) if part.prefer == "fastest" else {},
    )


def _way_rows(ways: Ways) -> dict[str, doc.WayRow]:
    gauges = {Way.SITE: ways.site, Way.REGISTRY: ways.registry}
    return {
        way.value: doc.WayRow(
            rate=gauge.rate,
            first_s=gauge.first_s,
            chosen={choice.reason.value: count for choice, count in ways.chosen.items() if choice.way is way},
        )
        for way, gauge in gauges.items()
    }


def _tier_rows(statistics: Mapping[str, StoreStatistics]) -> dict[str, doc.TierRow]:
    return {
        tier: doc.TierRow(
            bytes=row.bytes,
            budget_bytes=row.budget_bytes,
            entries=row.entries,
            pinned_bytes=row.pinned_bytes,
            probation_bytes=row.probation_bytes,
        )
        for tier, row in statistics.items()
    }


def _cached(digest: Digest, tier: str, holdings: Holdings, *, pinned: bool) -> doc.CachedObject:
    shards = sum(bits.bit_count() for bits in holdings.shards.values())
    blocks = holdings.blocks.bit_count()
    return doc.CachedObject(digest=str(digest), tier=tier, blocks=blocks, shards=shards, pinned=pinned)
