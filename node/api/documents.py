"""The documents of the control API.

Each struct is one JSON document, or a row of one, as `curl --unix-socket` and `p2pctl --json` print it. Fields are
added, never renamed. Sizes are bytes, digests `sha256:...`; a source is a `node.telemetry.sources.Source` or, for a
block that this node did not read, `NOT_READ`. A value that is not known is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Literal

import msgspec

from protocol.ids import ObjectRef

NOT_READ = "not read"
MAX_UNREAD_ROWS = 1 << 12
"""Rows of one report for blocks that were not read: their number follows from the sizes that a manifest claims."""


class Document(msgspec.Struct, frozen=True, kw_only=True):
    pass


class TierRow(Document, frozen=True):
    bytes: int
    budget_bytes: int
    entries: int
    pinned_bytes: int = 0
    probation_bytes: int = 0
    """Kept for other members only."""


class BulkTotals(Document, frozen=True):
    """Bytes on the bulk channel, including coding and headers."""

    bytes_sent: int = 0
    bytes_received: int = 0


class Wear(Document, frozen=True):
    """Since the start: bytes that this process wrote to disks, and bytes that it sent to clients and members."""

    written_bytes: int = 0
    served_bytes: int = 0


class EndpointRow(Document, frozen=True):
    """A registry or a mirror of it. `problem` is the reason why it is skipped for `retry_in_s`, "" while it answers."""

    url: str
    problem: str = ""
    retry_in_s: float = 0.0
    bytes_received: int = 0


class UplinkRow(Document, frozen=True):
    """This node's current part of the site's limits; `rate` in bytes per second, 0 for no limit.

    During the `free` hours neither limit holds, and no bytes count as used.
    """

    rate: float
    daily_bytes: float
    used_today_bytes: int
    free: bool
    spent: bool


class WayRow(Document, frozen=True):
    """What one way to the bytes of an upstream gave lately. `rate` in bytes per second in use, 0 if nothing is known;
    `first_s` until the first byte. `chosen`: reads for clients that took it, by reason."""

    rate: float
    first_s: float
    chosen: dict[str, int] = {}


class UpstreamRow(Document, frozen=True):
    """`endpoints` are in the order in which they are asked; the last, `url`, is the registry itself.

    `uplink` is null for an upstream without limits. `ways` (`site` and `registry`) is empty unless `prefer` is
    `fastest`.
    """

    name: str
    url: str
    endpoints: tuple[EndpointRow, ...] = ()
    uplink: UplinkRow | None = None
    prefer: str = "site"
    ways: dict[str, WayRow] = {}


class ClusterRow(Document, frozen=True):
    """`id` is the SHA-256 of the CA certificate, in hexadecimal; `admits`: this node can admit others.

    `certificate_ends` is Unix time, null for one that does not expire; `revocations` counts those that this node holds.
    """

    id: str
    admits: bool
    certificate_ends: float | None = None
    revocations: int = 0


class Status(Document, frozen=True):
    """`peers_alive` counts the other members of the site; `mirror` is `host:port`."""

    name: str
    site: str
    peer_id: str
    addresses: tuple[str, ...]
    uptime_s: float
    version: str
    ready: bool
    peers_alive: int
    bytes_served: dict[str, int]
    requests: dict[str, int]
    cache: dict[str, TierRow]
    origin_bytes: int
    rss_bytes: int
    bulk: BulkTotals = BulkTotals()
    mirror: str = ""
    wear: Wear = Wear()
    upstreams: tuple[UpstreamRow, ...] = ()
    cluster: ClusterRow | None = None


class PeerHealth(Document, frozen=True):
    """`latency_ms` is a moving average over block reads; `failures` counts those since the last success."""

    latency_ms: float | None = None
    failures: int = 0


class EvidenceRow(Document, frozen=True):
    """A record of a peer that another member found to be false. `contradicted`: the peer signed another one, too.

    `block` is `digest#index`. `verdict` is this node's own finding: a Verdict of node/evidence/cases.py.
    """

    block: str
    source: str
    found_by: str
    found_by_id: str
    age_s: float
    verdict: str
    contradicted: bool = False


class PeerRow(Document, frozen=True):
    """`since_s` is the time in this `state`; `quarantine` is its reason, empty for a peer that is not in quarantine.

    `evidence` lists the accusations against the peer, proven or not.
    """

    peer_id: str
    name: str
    site: str
    state: Literal["alive", "suspect", "dead", "left"]
    addresses: tuple[str, ...] = ()
    since_s: float = 0.0
    rtt_ms: float | None = None
    health: PeerHealth = PeerHealth()
    bytes_received: int = 0
    bytes_sent: int = 0
    quarantine: str = ""
    evidence: tuple[EvidenceRow, ...] = ()


class PeersReport(Document, frozen=True):
    peers: tuple[PeerRow, ...]


class ImageRow(Document, frozen=True):
    """An image that this node resolved. `age_s`: since the registry last confirmed the tag; `size`: all its objects."""

    image: str
    digest: str
    media_type: str
    size: int
    bytes_held: int
    complete: bool
    layers: int
    age_s: float | None = None


class ImagesReport(Document, frozen=True):
    images: tuple[ImageRow, ...]


TagState = Literal["fresh", "due", "stale", "too old"]


class TagRow(Document, frozen=True):
    """`age_s` is the time since the answer. `source`: the registry told it to this node, this node imported it, or the
    registry is out of reach and the members in `told_by` (names or peer ids) agree on it.

    `state`: a `fresh` tag is served without asking; for a `due` one the next pull asks the registry; if it was out of
    reach at the last pull, a `stale` tag is served and a `too old` one is not. `rule` is the policy's pattern, "" for
    the defaults.
    """

    tag: str
    digest: str
    age_s: float
    state: TagState
    source: Literal["registry", "import", "members"]
    ttl_s: float
    max_age_s: float
    cache: bool = True
    told_by: tuple[str, ...] = ()
    rule: str = ""


class TagsReport(Document, frozen=True):
    tags: tuple[TagRow, ...]


class CachedObject(Document, frozen=True):
    """The whole blocks, and the shards of blocks, that one tier holds of one object."""

    digest: str
    tier: str
    blocks: int
    shards: int
    pinned: bool = False


class CacheReport(Document, frozen=True):
    tiers: dict[str, TierRow]
    objects: tuple[CachedObject, ...] = ()
    wear: Wear = Wear()


class PullProgress(Document, frozen=True, tag_field="event", tag="progress"):
    """`bytes_total` grows while manifests are still being read; `object` is the digest that was read last."""

    phase: Literal["resolving", "pulling"]
    object: str = ""
    bytes_done: int = 0
    bytes_total: int = 0
    by_source: dict[str, int] = {}


class PullResult(Document, frozen=True, tag_field="event", tag="result"):
    """The last line of every pull."""

    ok: bool
    image: str
    seconds: float
    digest: str = ""
    error: str = ""
    bytes_total: int = 0
    by_source: dict[str, int] = {}


PullEvent = PullProgress | PullResult


class WhyBlock(Document, frozen=True):
    """How this node obtained one block. `peers` are the peer ids that answered; `when` is Unix time. `way`: which way
    was chosen and why, if there was a choice."""

    index: int
    length: int
    source: str
    peers: tuple[str, ...] = ()
    milliseconds: float | None = None
    retries: int = 0
    when: float | None = None
    way: str = ""


class WhyObject(Document, frozen=True):
    digest: str
    media_type: str
    size: int
    blocks: tuple[WhyBlock, ...]


class WhyTotal(Document, frozen=True):
    blocks: int = 0
    bytes: int = 0


class WhyReport(Document, frozen=True):
    """Contains every block of the image once, except blocks that were not read, of which MAX_UNREAD_ROWS are listed.
    `totals` are by source, of all blocks."""

    image: str
    digest: str
    objects: tuple[WhyObject, ...]
    totals: dict[str, WhyTotal]


class RevokeReport(Document, frozen=True):
    """`subject` is a peer id, or `token:` and a token's id; `total` counts the revocations that this node holds."""

    subject: str
    new: bool
    total: int


class ReloadReport(Document, frozen=True):
    """One line for each key, `cache.disk: "10GiB" -> "20GiB"`. Those in `needs_restart` are not applied yet."""

    changed: tuple[str, ...]
    needs_restart: tuple[str, ...]


Level = Literal["ok", "warn", "fail"]


class Check(Document, frozen=True):
    """`hint` is the remedy; empty for level ok."""

    name: str
    level: Level
    text: str
    hint: str = ""


class DoctorReport(Document, frozen=True):
    checks: tuple[Check, ...]


Phase = Literal["checking", "storing", "reading", "writing"]
PrefetchState = Literal["waiting", "running", "done", "failed", "cancelled"]


class WorkProgress(Document, frozen=True, tag_field="event", tag="progress"):
    """`object` is the digest that was processed last."""

    phase: Phase
    object: str = ""
    bytes_done: int = 0
    bytes_total: int = 0


class WorkResult(Document, frozen=True, tag_field="event", tag="result"):
    """The last line of every export, import and pin. `images` are `NAME@DIGEST`."""

    ok: bool
    seconds: float
    images: tuple[str, ...] = ()
    objects: int = 0
    bytes_total: int = 0
    error: str = ""


WorkEvent = WorkProgress | WorkResult


class PinRow(Document, frozen=True):
    """`bytes_held` are on this node's disk; `since` is Unix time."""

    image: str
    digest: str
    size: int
    bytes_held: int
    since: float


class PinsReport(Document, frozen=True):
    """`bytes` counts objects shared by several images once; at most `most_bytes` may be pinned."""

    pins: tuple[PinRow, ...]
    bytes: int
    most_bytes: int


class PrefetchOrder(Document, frozen=True, forbid_unknown_fields=True):
    """No `platforms` means this node's; `all_platforms` overrides them. `rate` is in bytes a second, 0 for no limit;
    `window` is for example "22:00-06:00", or "" for any time."""

    images: tuple[str, ...]
    platforms: tuple[str, ...] = ()
    all_platforms: bool = False
    rate: int = 0
    window: str = ""


class PrefetchRow(Document, frozen=True):
    image: str
    state: PrefetchState
    bytes_done: int = 0
    bytes_total: int = 0
    rate: int = 0
    window: str = ""
    error: str = ""


class PrefetchReport(Document, frozen=True):
    """`waits_for` is the reason why the current order waits; empty if it does not wait."""

    rows: tuple[PrefetchRow, ...]
    waits_for: str = ""


class GcReport(Document, frozen=True):
    """`bytes` on disk were removed, or would be without `dry_run`; `held_bytes` are left."""

    dry_run: bool
    pieces: int
    bytes: int
    held_bytes: int
    pinned_bytes: int


def why_object(ref: ObjectRef, media_type: str, read: Mapping[int, WhyBlock], unread_rows: int) -> WhyObject:
    """The blocks of an object: those in `read` as given, and up to `unread_rows` others as not read."""
    unread = islice((index for index in range(ref.block_count) if index not in read), unread_rows)
    rows = {index: WhyBlock(index=index, length=ref.block_length(index), source=NOT_READ) for index in unread}
    blocks = tuple(block for _, block in sorted({**rows, **read}.items()))
    return WhyObject(digest=str(ref.digest), media_type=media_type, size=ref.size, blocks=blocks)


def why_report(image: str, digest: str, objects: Iterable[tuple[ObjectRef, str, Mapping[int, WhyBlock]]]) -> WhyReport:
    """`objects`: each with its media type and the blocks that were read."""
    listed: list[WhyObject] = []
    totals: dict[str, WhyTotal] = {}

    def count(source: str, blocks: int, size: int) -> None:
        total = totals.get(source, WhyTotal())
        if blocks:
            totals[source] = WhyTotal(blocks=total.blocks + blocks, bytes=total.bytes + size)

    room = MAX_UNREAD_ROWS
    for ref, media_type, read in objects:
        listed.append(why_object(ref, media_type, read, room))
        room -= len(listed[-1].blocks) - len(read)
        for block in read.values():
            count(block.source, 1, block.length)
        count(NOT_READ, ref.block_count - len(read), ref.size - sum(block.length for block in read.values()))
    return WhyReport(image=image, digest=digest, objects=tuple(listed), totals=totals)
