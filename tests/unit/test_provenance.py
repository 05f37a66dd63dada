"""The account of reads keeps the latest, and no more than its bounds."""

from __future__ import annotations

import pytest

from node.telemetry import provenance as ledger_module
from node.telemetry.provenance import Ledger, Read
from node.telemetry.sources import Source
from protocol.ids import Digest

READ = Read(Source.ORIGIN, 0.1, 0, (), 0.0)


def digest(number: int) -> Digest:
    return Digest("sha256", f"{number:064x}")


@pytest.mark.parametrize(("objects", "blocks", "kept"), [(5, 4, [0, 0, 4, 4, 4]), (1, 30, [12]), (2, 30, [0, 12])])
def test_the_latest_reads_are_kept(monkeypatch: pytest.MonkeyPatch, objects: int, blocks: int, kept: list[int]) -> None:
    monkeypatch.setattr(ledger_module, "MAX_BLOCKS", 12)
    ledger = Ledger()
    for number in range(objects):
        for index in range(blocks):
            ledger.note(digest(number), index, READ, 10)
            ledger.note(digest(number), index, READ, 10)
    assert [len(ledger.reads(digest(number))) for number in range(objects)] == kept
    assert blocks - 1 in ledger.reads(digest(objects - 1))
    assert ledger.bytes_served[Source.ORIGIN] == objects * blocks * 20
