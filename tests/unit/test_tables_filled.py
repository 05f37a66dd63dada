"""The bounded tables of a node, filled to their bounds, together take at most 32 MiB."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import trio

from cache.lru_k import HISTORY_CEILING, LRUKCache
from node.blocks import object_facts
from node.blocks.object_facts import ObjectFacts, origin_of
from node.config.tag_policy import TagPolicies, TagPolicy
from node.content import name_table
from node.content.agreement import Agreement
from node.content.known_names import KnownNames
from node.content.name_table import NameTable
from node.oci.manifests import Resolved
from node.oci.references import Locator
from node.telemetry import provenance
from node.telemetry.provenance import Provenance, Read
from node.telemetry.sources import Source
from protocol import directory
from protocol.directory import Directory
from protocol.ids import Digest, ObjectRef, PeerId

TOGETHER = 32 << 20
MANIFEST = "application/vnd.oci.image.manifest.v1+json"

BODY = json.dumps(
    {"schemaVersion": 2, "mediaType": MANIFEST, "config": {"digest": f"sha256:{'0' * 64}", "size": 2}, "layers": []}
).encode()


def digest(number: int) -> Digest:
    return Digest("sha256", f"{number:064x}")


def peer(number: int) -> PeerId:
    return PeerId(f"12D3KooW{number:044d}")


def reads() -> Provenance:
    """Each block was read in its own time from members of its own choice."""
    table, peers = Provenance(), [peer(number) for number in range(32)]
    each = provenance.MAX_BLOCKS // provenance.MAX_OBJECTS
    for number in range(provenance.MAX_BLOCKS):
        chosen = tuple(peers[(number + step) % 32] for step in range(5))
        read = Read(Source.PEER, seconds=number / 7, retries=1, peers=chosen, at=1e9 + number / 3)
        table.note(digest(number // each), number % each, read, 1)
    return table


def announcements() -> Directory:
    """Each object was announced by one member, which takes most memory, at its own time."""
    table = Directory()
    for number in range(directory.MAX_ANNOUNCEMENTS):
        member = peer(number // directory.MAX_ANNOUNCED)
        table.announce(digest(number), member, number / 1e6)
    assert len(table) == directory.MAX_ANNOUNCEMENTS
    return table


def history() -> LRUKCache[Digest, int]:
    """References to what was evicted."""
    now = 0.0
    table: LRUKCache[Digest, int] = LRUKCache(1 << 62, k=3, timer=lambda: now)
    for number in range(HISTORY_CEILING // 8 * 9):
        for _ in range(3):
            now += 1.0
            table[digest(number)] = 1
    for number in range(HISTORY_CEILING):
        del table[digest(number)]
    assert len(table.gone) == HISTORY_CEILING
    table.worth(1, 1)
    return table


def names() -> KnownNames:
    table = KnownNames(NameTable(Path(":memory:")), TagPolicies(TagPolicy("", 1.0, 60.0)))
    for number in range(name_table.MAX_RECENT):
        locator = Locator.parse(f"docker.io/library/image-{number}#manifests")
        resolved = Resolved(ObjectRef(digest(number), 1000), MANIFEST)
        table.confirm(locator, f"tag-{number}", resolved, None)
        table.unanswered(locator, f"tag-{number}")
        table.hear(locator, f"tag-{number}", Agreement(resolved, (peer(1), peer(2)), 2), signed=False)
        table.check_type(resolved, BODY)
        table.doubt(locator, resolved.ref)
    return table


def facts() -> ObjectFacts:
    table = ObjectFacts()
    for number in range(object_facts.MAX_RECENT):
        table.arrived(digest(number), origin_of(Locator.parse(f"docker.io/library/image-{number}#manifests")))
        table.verified(ObjectRef(digest(number), 1000 + number))
    return table


def test_all_tables_filled_to_their_bounds() -> None:
    tables: list[Callable[[], object]] = [reads, announcements, history, names, facts]

    async def main() -> dict[str, float]:
        taken = {}
        for fill in tables:
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            table = fill()
            gc.collect()
            taken[fill.__name__] = (tracemalloc.get_traced_memory()[0] - before) / (1 << 20)
            del table
        return taken

    tracemalloc.start()
    try:
        taken = trio.run(main)
    finally:
        tracemalloc.stop()
    print({name: round(size, 1) for name, size in taken.items()})
    # The disk has a history of what was used here, and one of what was kept for members.
    assert sum(taken.values()) + taken["history"] <= TOGETHER / (1 << 20), taken
