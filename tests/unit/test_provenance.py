"""Provenance keeps the latest reads, within its bounds."""

from __future__ import annotations

import pytest

from node.telemetry import provenance as provenance_module
from node.telemetry.provenance import Provenance, Read
from node.telemetry.sources import Source
from protocol.ids import Digest

READ = Read(Source.ORIGIN, seconds=0.1, retries=0, peers=(), at=0.0)


def digest(number: int) -> Digest:
    return Digest("sha256", f"{number:064x}")


@pytest.mark.parametrize(("objects", "blocks", "kept"), [(5, 4, [0, 0, 4, 4, 4]), (1, 30, [12]), (2, 30, [0, 12])])
def test_the_latest_reads_are_kept(monkeypatch: pytest.MonkeyPatch, objects: int, blocks: int, kept: list[int]) -> None:
    monkeypatch.setattr(provenance_module, "MAX_BLOCKS", 12)
    provenance = Provenance()
    for number in range(objects):
        for index in range(blocks):
            provenance.note(digest(number), index, READ, 10)
            provenance.note(digest(number), index, READ, 10)
    assert [len(provenance.reads(digest(number))) for number in range(objects)] == kept
    assert blocks - 1 in provenance.reads(digest(objects - 1))
    assert provenance.bytes_served[Source.ORIGIN] == objects * blocks * 20
