"""The control API's documents as a person reads them. Text from elsewhere is stripped of terminal controls."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import singledispatch
from itertools import groupby

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from node.api.documents import (
    NOT_READ,
    CacheReport,
    Check,
    ClusterRow,
    ImagesReport,
    PeerRow,
    PeersReport,
    PullResult,
    Status,
    TagRow,
    TagsReport,
    TierRow,
    UplinkRow,
    UpstreamRow,
    Wear,
    WhyBlock,
    WhyObject,
    WhyReport,
)

PIPED_WIDTH = 200
"""Columns where there is no terminal to measure: tables stay on one line, for grep."""
SHORT_DIGEST = len("sha256:") + 12
SHORT_PEER = 8
"""The last characters of a peer id; the first are the same for all."""


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
    """`350 ms`, `12 s`, `5 m 12 s`, `3 h 4 m`, `2 d 3 h`; a dash where it is not known."""
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
def transfer_bar(text: str) -> Iterator[tuple[Progress, TaskID]]:
    """On standard error, and only on a terminal."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
        TimeElapsedColumn(),
    )  # fmt: skip
    err = Console(stderr=True)
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        yield progress, progress.add_task(escape(text), total=None)


def new_table(*columns: str, title: str | None = None) -> Table:
    """A column whose name starts with `>` is a number's."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in columns:
        justify = "right" if name.startswith(">") else "left"
        table.add_column(name.lstrip(">"), justify=justify, overflow="fold", no_wrap=justify == "right")  # type: ignore[arg-type]
    return table


def new_row(table: Table, *cells: object) -> None:
    table.add_row(*map(plain, cells))


@singledispatch
def show(document: msgspec.Struct, out: Console) -> None:
    """Print one of the documents below."""
    raise TypeError(f"no table for {type(document).__name__}")


@show.register
def _status(status: Status, out: Console) -> None:
    facts = new_table("", "")
    facts.show_header = False
    for name, value in (
        ("node", f"{status.name} (site {status.site})"),
        ("peer id", status.peer_id),
        ("cluster", _cluster(status.cluster)),
        ("addresses", " ".join(status.addresses) or "-"),
        ("mirror", f"http://{status.mirror}" if status.mirror else "-"),
        ("state", f"{'ready' if status.ready else 'starting'}, up {duration(status.uptime_s)}, p2pd {status.version}"),
        ("peers alive", status.peers_alive),
        ("from registries", size(status.origin_bytes)),
        ("bulk channel", f"{size(status.bulk.bytes_sent)} sent, {size(status.bulk.bytes_received)} received"),
        ("memory in use", size(status.rss_bytes)),
        ("written to disk", _wear(status.wear)),
    ):
        new_row(facts, name, value)
    out.print(facts)
    out.print()
    show_sources(out, status.bytes_served, status.requests)
    out.print()
    show_tiers(out, status.cache)
    if status.upstreams:
        out.print()
        _upstreams(status.upstreams, out)


def _cluster(row: ClusterRow | None) -> str:
    if row is None:
        return "-"
    left = ""
    if row.certificate_ends is not None:
        seconds = row.certificate_ends - time.time()
        left = f", certificate for {duration(seconds)}" if seconds > 0 else ", certificate over"
    return f"{row.id[:16]} ({'has its key' if row.admits else 'joined'}{left}, {row.revocations} revoked)"


def _upstreams(rows: Iterable[UpstreamRow], out: Console) -> None:
    table = new_table("upstream", "url", ">received", "state", "uplink")
    for row in rows:
        for one in row.endpoints:
            state = f"{one.problem}; again in {duration(one.retry_in_s)}" if one.problem else "ok"
            new_row(table, row.name, one.url, size(one.bytes_received), state, _uplink(row.uplink))
    out.print(table)


def _uplink(row: UplinkRow | None) -> str:
    if row is None:
        return "no limit"
    parts = [f"{size(row.rate)}/s"] if row.rate else []
    if row.daily_bytes:
        parts.append(f"{size(row.used_today_bytes)} of {size(row.daily_bytes)} today{', spent' if row.spent else ''}")
    return "; ".join(parts) + (" (free at this hour)" if row.free else "")


def show_sources(out: Console, by_bytes: Mapping[str, int], requests: Mapping[str, int] | None = None) -> None:
    total = sum(by_bytes.values())
    table = new_table("source", ">bytes", ">share", *([">blocks"] if requests is not None else []))
    for source, count in by_bytes.items():
        share = f"{100 * count / total:.1f} %" if total else "-"
        new_row(table, source, size(count), share, *([requests.get(source, 0)] if requests is not None else []))
    out.print(table)


def show_tiers(out: Console, tiers: Mapping[str, TierRow]) -> None:
    table = new_table("tier", ">held", ">budget", ">entries", ">pinned")
    for name, tier in tiers.items():
        budget = size(tier.budget_bytes) if tier.budget_bytes else "-"
        pinned = size(tier.pinned_bytes) if tier.pinned_bytes else "-"
        new_row(table, name, size(tier.bytes), budget, tier.entries, pinned)
    out.print(table)


def _wear(wear: Wear) -> str:
    ratio = f", {wear.written_bytes / wear.served_bytes:.2f} for each byte served" if wear.served_bytes else ""
    return f"{size(wear.written_bytes)}{ratio}"


@show.register
def _peers(report: PeersReport, out: Console) -> None:
    if not report.peers:
        out.print("no other member is known")
        return
    table = new_table(
        "name", "site", "state", ">for", ">rtt ms", ">read ms", ">failed", ">received", ">sent", "addresses", "id"
    )
    for peer in report.peers:
        new_row(
            table, peer.name, peer.site, _peer_state(peer), duration(peer.since_s), milliseconds(peer.rtt_ms),
            milliseconds(peer.health.latency_ms), peer.health.failures, size(peer.bytes_received),
            size(peer.bytes_sent), " ".join(peer.addresses), short_peer(peer.peer_id),
        )  # fmt: skip
    out.print(table)
    if any(peer.evidence for peer in report.peers):
        out.print()
        _evidence(report.peers, out)


def _evidence(peers: Iterable[PeerRow], out: Console) -> None:
    table = new_table("false record by", "of block", "found by", ">ago", "and is")
    for peer in peers:
        for one in peer.evidence:
            digest, _, index = one.block.partition("#")
            new_row(
                table, peer.name, f"{digest[:SHORT_DIGEST]} #{index}", one.found_by, duration(one.age_s), one.verdict
            )
    out.print(table)


def _peer_state(peer: PeerRow) -> str:
    return f"quarantined: {peer.quarantine}" if peer.quarantine else peer.state


def short_peer(peer_id: str) -> str:
    return peer_id[-SHORT_PEER:]


@show.register
def _images(report: ImagesReport, out: Console) -> None:
    if not report.images:
        out.print("no image was asked for yet")
        return
    table = new_table("image", "digest", ">size", ">held", "whole", ">layers", ">confirmed")
    for image in report.images:
        new_row(
            table, image.image, image.digest[:SHORT_DIGEST], size(image.size), size(image.bytes_held),
            "yes" if image.complete else "no", image.layers, duration(image.age_s),
        )  # fmt: skip
    out.print(table)


@show.register
def _tags(report: TagsReport, out: Console) -> None:
    if not report.tags:
        out.print("no such tag was asked for yet")
        return
    table = new_table("tag", "digest", ">confirmed", "state", "told by", ">asked again after", ">offline up to", "rule")
    for row in report.tags:
        new_row(
            table, row.tag, row.digest[:SHORT_DIGEST], duration(row.age_s), row.state, _told_by(row),
            duration(row.ttl_s) if row.cache else "always", duration(row.max_age_s) if row.cache else "never",
            row.rule or "-",
        )  # fmt: skip
    out.print(table)


def _told_by(row: TagRow) -> str:
    return short_peer(row.told_by) if row.told_by.startswith("12D3") else row.told_by or row.source


@show.register
def _cache(report: CacheReport, out: Console) -> None:
    show_tiers(out, report.tiers)
    out.print(f"\nwritten to disk since the start: {_wear(report.wear)}")
    if not report.objects:
        return
    out.print()
    table = new_table("object", "tier", ">blocks", ">shards", "")
    for row in sorted(report.objects, key=lambda row: (-row.blocks, row.digest)):
        new_row(table, row.digest[:SHORT_DIGEST], row.tier, row.blocks, row.shards, "pinned" if row.pinned else "")
    out.print(table)


def show_pulled(out: Console, result: PullResult) -> None:
    rate = size(result.bytes_total / result.seconds) if result.seconds > 0 else "-"
    out.print(plain(f"{result.image} {result.digest}"), soft_wrap=True)
    out.print(f"{size(result.bytes_total)} in {duration(result.seconds)} ({rate}/s)")
    out.print()
    show_sources(out, result.by_source)


# Why


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks from one source. `slowest_ms` is None where no time is known."""

    first: int
    last: int
    bytes: int
    source: str
    peers: tuple[str, ...]
    slowest_ms: float | None
    retries: int


def runs(blocks: Iterable[WhyBlock]) -> Iterator[Run]:
    """Split by source; every block is in exactly one run. `peers` are all that answered for one of its blocks."""
    for source, group in groupby(blocks, key=lambda block: block.source):
        same = list(group)
        times = [block.milliseconds for block in same if block.milliseconds is not None]
        peers = {peer for block in same for peer in block.peers}
        yield Run(
            same[0].index, same[-1].index, sum(block.length for block in same), source, tuple(sorted(peers)),
            max(times, default=None), sum(block.retries for block in same),
        )  # fmt: skip


def show_why(out: Console, report: WhyReport, names: Mapping[str, str], *, every_block: bool) -> None:
    """`names` by peer id; a peer that is not in it is shown by the end of its id."""
    out.print(plain(f"{report.image} {report.digest}"), soft_wrap=True)
    for listing in report.objects:
        out.print()
        out.print(plain(f"{listing.digest} {size(listing.size)} {listing.media_type}"), soft_wrap=True)
        _show_object(out, listing, names, every_block=every_block)
    out.print()
    out.print(totals_line(report), soft_wrap=True)


def _show_object(out: Console, listing: WhyObject, names: Mapping[str, str], *, every_block: bool) -> None:
    table = new_table("blocks", ">size", "source", ">slowest ms", ">retries", "peers")
    single = (run for block in listing.blocks for run in runs([block]))
    for run in single if every_block else runs(listing.blocks):
        span = str(run.first) if run.first == run.last else f"{run.first}-{run.last}"
        peers = ", ".join(names.get(peer) or short_peer(peer) for peer in run.peers)
        retries = "-" if run.source == NOT_READ else run.retries
        new_row(table, span, size(run.bytes), run.source, milliseconds(run.slowest_ms), retries, peers)
    out.print(table)


def totals_line(report: WhyReport) -> str:
    """Accounts for all blocks of the image."""
    count = sum(total.blocks for total in report.totals.values())
    whole = sum(total.bytes for total in report.totals.values())
    parts = (f"{total.blocks} {plain(source)} ({size(total.bytes)})" for source, total in report.totals.items())
    return f"all {count} blocks, {size(whole)}: {', '.join(parts) or 'none'}"


# Doctor

_MARKS = {"ok": ("ok  ", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red")}


def show_checks(out: Console, checks: Iterable[Check]) -> None:
    for check in checks:
        mark, colour = _MARKS[check.level]
        out.print(mark, style=colour, end=" ")
        out.print(plain(f"{check.name}: {check.text}"), soft_wrap=True)
        if check.hint and check.level != "ok":
            out.print(f"       {plain(check.hint)}", soft_wrap=True)
