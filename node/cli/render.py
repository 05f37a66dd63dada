"""The control API's documents as tables for a person.

Names, addresses and errors come from other machines, so `plain` replaces every terminal control character in them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import singledispatch
from itertools import groupby
from typing import Literal

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.table import Table

from node.api import documents

PIPED_WIDTH = 200
"""Columns if the output is not a terminal: table rows stay on one line, for grep."""
SHORT_DIGEST = len("sha256:") + 12
SHORT_PEER = 8
"""The last characters of a peer id: the first are the same in all."""


def console() -> Console:
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    return Console(markup=False, emoji=False, highlight=False, width=width)


def plain(value: object) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(value))


def size(count: float) -> str:
    """Binary units: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float | None) -> str:
    """`350 ms`, `12 s`, `5 m 12 s`, `3 h 4 m`, `2 d 3 h`; a dash for None."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    whole = int(seconds)
    for unit, inner, length, part in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {inner}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


@contextmanager
def transfer_bar(title: str) -> Iterator[Callable[[documents.PullProgress | documents.WorkProgress], None]]:
    """A bar on standard error, and only on a terminal. Without a title it shows the phase of each event."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    err = Console(stderr=True)
    progress = Progress(
        *columns, TransferSpeedColumn(), TimeElapsedColumn(), console=err, transient=True, disable=not err.is_terminal
    )
    with progress:
        task = progress.add_task(escape(title), total=None)

        def update(event: documents.PullProgress | documents.WorkProgress) -> None:
            text = escape(title or event.phase)
            progress.update(task, completed=event.bytes_done, total=event.bytes_total or None, description=text)

        yield update


def show_table(out: Console, rows: Sequence[Mapping[str, object]], *, header: bool = True, empty: str = "") -> None:
    """A row maps column names to cells; a name with `>` is a column of numbers. Prints `empty` if there are no rows."""
    if empty and not rows:
        out.print(empty)
        return
    table = Table(show_header=header, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in rows[0] if rows else ():
        justify: Literal["left", "right"] = "right" if name.startswith(">") else "left"
        table.add_column(name.lstrip(">"), justify=justify, overflow="fold", no_wrap=justify == "right")
    for row in rows:
        table.add_row(*map(plain, row.values()))
    out.print(table)


@singledispatch
def show(document: msgspec.Struct, out: Console) -> None:
    """Print a document. A function for each type is registered below."""
    raise TypeError(f"no table for {type(document).__name__}")


@show.register
def _status(status: documents.Status, out: Console) -> None:
    facts = {
        "node": f"{status.name} (site {status.site})",
        "peer id": status.peer_id,
        "cluster": _cluster(status.cluster),
        "addresses": " ".join(status.addresses) or "-",
        "mirror": f"http://{status.mirror}" if status.mirror else "-",
        "state": f"{'ready' if status.ready else 'starting'}, up {duration(status.uptime_s)}, p2pd {status.version}",
        "peers alive": status.peers_alive,
        "from registries": size(status.origin_bytes),
        "bulk channel": f"{size(status.bulk.bytes_sent)} sent, {size(status.bulk.bytes_received)} received",
        "memory in use": size(status.rss_bytes),
        "written to disk": _wear(status.wear),
    }
    show_table(out, [{"name": name, "value": value} for name, value in facts.items()], header=False)
    out.print()
    show_sources(out, status.bytes_served, status.requests)
    out.print()
    show_tiers(out, status.cache)
    if status.upstreams:
        out.print()
        _upstreams(status.upstreams, out)


def _cluster(row: documents.ClusterRow | None) -> str:
    if row is None:
        return "-"
    left = ""
    if row.certificate_ends is not None:
        seconds = row.certificate_ends - time.time()
        left = f", certificate for {duration(seconds)}" if seconds > 0 else ", certificate expired"
    return f"{row.id[:16]} ({'has its key' if row.admits else 'joined'}{left}, {row.revocations} revoked)"


def _upstreams(upstreams: Sequence[documents.UpstreamRow], out: Console) -> None:
    rows = [
        {
            "upstream": upstream.name,
            "url": endpoint.url,
            ">received": size(endpoint.bytes_received),
            "state": f"{endpoint.problem}; again in {duration(endpoint.retry_in_s)}" if endpoint.problem else "ok",
            "uplink": _uplink(upstream.uplink),
        }
        for upstream in upstreams
        for endpoint in upstream.endpoints
    ]
    show_table(out, rows)
    _ways(upstreams, out)


def _ways(upstreams: Iterable[documents.UpstreamRow], out: Console) -> None:
    rows = [
        {
            "upstream": upstream.name,
            "way": way,
            ">lately": f"{size(row.rate)}/s" if row.rate else "-",
            ">first byte ms": milliseconds(1000 * row.first_s if row.rate else None),
            "reads": ", ".join(f"{count} {reason}" for reason, count in row.chosen.items()) or "none",
        }
        for upstream in upstreams
        for way, row in upstream.ways.items()
    ]
    if rows:
        out.print()
        show_table(out, rows)


def _uplink(row: documents.UplinkRow | None) -> str:
    if row is None:
        return "no limit"
    parts = [f"{size(row.rate)}/s"] if row.rate else []
    if row.daily_bytes:
        parts.append(f"{size(row.used_today_bytes)} of {size(row.daily_bytes)} today{', spent' if row.spent else ''}")
    return "; ".join(parts) + (" (free at this hour)" if row.free else "")


def show_sources(out: Console, by_bytes: Mapping[str, int], requests: Mapping[str, int] | None = None) -> None:
    total = sum(by_bytes.values())
    rows = []
    for source, count in by_bytes.items():
        share = f"{100 * count / total:.1f} %" if total else "-"
        blocks = {} if requests is None else {">blocks": requests.get(source, 0)}
        rows.append({"source": source, ">bytes": size(count), ">share": share, **blocks})
    show_table(out, rows)


def show_tiers(out: Console, tiers: Mapping[str, documents.TierRow]) -> None:
    rows = [
        {
            "tier": name,
            ">held": size(tier.bytes),
            ">budget": size(tier.budget_bytes) if tier.budget_bytes else "-",
            ">entries": tier.entries,
            ">pinned": size(tier.pinned_bytes) if tier.pinned_bytes else "-",
            ">for members": size(tier.probation_bytes) if tier.probation_bytes else "-",
        }
        for name, tier in tiers.items()
    ]
    show_table(out, rows)


def _wear(wear: documents.Wear) -> str:
    ratio = f", {wear.written_bytes / wear.served_bytes:.2f} for each byte served" if wear.served_bytes else ""
    return f"{size(wear.written_bytes)}{ratio}"


@show.register
def _peers(report: documents.PeersReport, out: Console) -> None:
    rows = [
        {
            "name": peer.name,
            "site": peer.site,
            "state": f"quarantined: {peer.quarantine}" if peer.quarantine else peer.state,
            ">for": duration(peer.since_s),
            ">rtt ms": milliseconds(peer.rtt_ms),
            ">read ms": milliseconds(peer.health.latency_ms),
            ">failed": peer.health.failures,
            ">received": size(peer.bytes_received),
            ">sent": size(peer.bytes_sent),
            "addresses": " ".join(peer.addresses),
            "id": short_peer(peer.peer_id),
        }
        for peer in report.peers
    ]
    show_table(out, rows, empty="no other member is known")
    if any(peer.evidence for peer in report.peers):
        out.print()
        show_table(out, [_evidence(peer, evidence) for peer in report.peers for evidence in peer.evidence])


def _evidence(peer: documents.PeerRow, evidence: documents.EvidenceRow) -> Mapping[str, object]:
    digest, _, index = evidence.block.partition("#")
    return {
        "false record by": peer.name,
        "of block": f"{digest[:SHORT_DIGEST]} #{index}",
        "found by": evidence.found_by,
        ">ago": duration(evidence.age_s),
        "and is": evidence.verdict,
    }


def short_peer(peer_id: str) -> str:
    return peer_id[-SHORT_PEER:]


@show.register
def _images(report: documents.ImagesReport, out: Console) -> None:
    rows = [
        {
            "image": image.image,
            "digest": image.digest[:SHORT_DIGEST],
            ">size": size(image.size),
            ">held": size(image.bytes_held),
            "whole": "yes" if image.complete else "no",
            ">layers": image.layers,
            ">confirmed": duration(image.age_s),
        }
        for image in report.images
    ]
    show_table(out, rows, empty="no image was asked for yet")


def _teller(name: str) -> str:
    return short_peer(name) if name.startswith("12D3") else name


@show.register
def _tags(report: documents.TagsReport, out: Console) -> None:
    rows = [
        {
            "tag": row.tag,
            "digest": row.digest[:SHORT_DIGEST],
            ">confirmed": duration(row.age_s),
            "state": row.state,
            "told by": ", ".join(map(_teller, row.told_by)) or row.source,
            ">asked again after": duration(row.ttl_s) if row.cache else "always",
            ">offline up to": duration(row.max_age_s) if row.cache else "never",
            "rule": row.rule or "-",
        }
        for row in report.tags
    ]
    show_table(out, rows, empty="no such tag was asked for yet")


@show.register
def _cache(report: documents.CacheReport, out: Console) -> None:
    show_tiers(out, report.tiers)
    out.print(f"\nwritten to disk since the start: {_wear(report.wear)}")
    if not report.objects:
        return
    out.print()
    rows = [
        {
            "object": held.digest[:SHORT_DIGEST],
            "tier": held.tier,
            ">blocks": held.blocks,
            ">shards": held.shards,
            "": "pinned" if held.pinned else "",
        }
        for held in sorted(report.objects, key=lambda held: (-held.blocks, held.digest))
    ]
    show_table(out, rows)


@show.register
def _pulled(result: documents.PullResult, out: Console) -> None:
    rate = size(result.bytes_total / result.seconds) if result.seconds > 0 else "-"
    out.print(plain(f"{result.image} {result.digest}"), soft_wrap=True)
    out.print(f"{size(result.bytes_total)} in {duration(result.seconds)} ({rate}/s)")
    out.print()
    show_sources(out, result.by_source)


@show.register
def _worked(result: documents.WorkResult, out: Console) -> None:
    for image in result.images:
        out.print(plain(image))
    out.print(f"{result.objects} objects, {size(result.bytes_total)} in {duration(result.seconds)}")


@show.register
def _pins(report: documents.PinsReport, out: Console) -> None:
    if report.pins:
        rows = [
            {
                "image": pin.image,
                "digest": pin.digest[:SHORT_DIGEST],
                ">size": size(pin.size),
                ">on disk": size(pin.bytes_held),
                ">for": duration(max(0.0, time.time() - pin.since)),
            }
            for pin in report.pins
        ]
        show_table(out, rows)
        out.print()
    out.print(f"{size(report.bytes)} pinned of {size(report.most_bytes)} allowed")


@show.register
def _prefetched(report: documents.PrefetchReport, out: Console) -> None:
    rows = [
        {
            "image": row.image,
            "state": row.state,
            ">done": size(row.bytes_done),
            ">of": size(row.bytes_total) if row.bytes_total else "-",
            ">rate": f"{size(row.rate)}/s" if row.rate else "-",
            "hours": row.window or "-",
            "error": row.error,
        }
        for row in report.rows
    ]
    show_table(out, rows, empty="nothing was ordered since p2pd started")
    if report.rows and report.waits_for:
        out.print(f"\nwaits for {plain(report.waits_for)}")


@show.register
def _gc(report: documents.GcReport, out: Console) -> None:
    verb = "would be removed" if report.dry_run else "removed"
    out.print(f"{size(report.bytes)} in {report.pieces} pieces {verb}")
    out.print(f"{size(report.held_bytes)} left, of which {size(report.pinned_bytes)} pinned")


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks from one source, by one way. `slowest_ms` is None if no block has a time."""

    first: int
    last: int
    bytes: int
    source: str
    peers: tuple[str, ...]
    slowest_ms: float | None
    retries: int
    way: str = ""


def runs(blocks: Iterable[documents.WhyBlock]) -> Iterator[Run]:
    """Group by source and way; every block is in one run. `peers` are all that answered for one of its blocks."""
    for (source, way), group in groupby(blocks, key=lambda block: (block.source, block.way)):
        same = list(group)
        times = [block.milliseconds for block in same if block.milliseconds is not None]
        peers = {peer for block in same for peer in block.peers}
        yield Run(
            first=same[0].index,
            last=same[-1].index,
            bytes=sum(block.length for block in same),
            source=source,
            peers=tuple(sorted(peers)),
            slowest_ms=max(times, default=None),
            retries=sum(block.retries for block in same),
            way=way,
        )


def show_why(out: Console, report: documents.WhyReport, names: Mapping[str, str], *, every_block: bool) -> None:
    """`names` by peer id; a peer without a name is shown by the end of its id."""
    out.print(plain(f"{report.image} {report.digest}"), soft_wrap=True)
    for listing in report.objects:
        out.print()
        out.print(plain(f"{listing.digest} {size(listing.size)} {listing.media_type}"), soft_wrap=True)
        _show_object(out, listing, names, every_block=every_block)
    out.print()
    out.print(totals_line(report), soft_wrap=True)


def _show_object(out: Console, listing: documents.WhyObject, names: Mapping[str, str], *, every_block: bool) -> None:
    single = (run for block in listing.blocks for run in runs([block]))
    rows = [
        {
            "blocks": str(run.first) if run.first == run.last else f"{run.first}-{run.last}",
            ">size": size(run.bytes),
            "source": run.source,
            ">slowest ms": milliseconds(run.slowest_ms),
            ">retries": "-" if run.source == documents.NOT_READ else run.retries,
            "peers": ", ".join(names.get(peer) or short_peer(peer) for peer in run.peers),
            **({"way": run.way} if any(block.way for block in listing.blocks) else {}),
        }
        for run in (single if every_block else runs(listing.blocks))
    ]
    show_table(out, rows)


def totals_line(report: documents.WhyReport) -> str:
    """The last line of `why`: all blocks of the image, by source."""
    count = sum(total.blocks for total in report.totals.values())
    whole = sum(total.bytes for total in report.totals.values())
    parts = (f"{total.blocks} {plain(source)} ({size(total.bytes)})" for source, total in report.totals.items())
    return f"all {count} blocks, {size(whole)}: {', '.join(parts) or 'none'}"


_MARKS = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


@show.register
def _checks(report: documents.DoctorReport, out: Console) -> None:
    for check in report.checks:
        mark, colour = _MARKS[check.level]
        out.print(mark, style=colour, end=" ")
        out.print(plain(f"{check.name}: {check.text}"), soft_wrap=True)
        if check.hint and check.level != "ok":
            out.print(f"       {plain(check.hint)}", soft_wrap=True)
