"""A clock that jumps in both directions: boards start in 1970, and their clocks are set minutes later."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
import trio

from cache.disk import DiskStore
from node.config.schema import UplinkPolicy
from node.content.name_table import NameTable
from node.mirror.access import PublicTable
from node.oci.manifests import Resolved
from node.oci.references import Locator
from node.registry.uplink import Uplink
from protocol.ids import Digest, ObjectRef
from tests.support.blobs import Blob

YEARS = 10 * 365 * 86400.0
APP = Locator("docker.io", "org/app", "manifests")
RESOLVED = Resolved(ObjectRef(Digest("sha256", "ab" * 32), 123), "a/b")


@pytest.fixture(params=[YEARS, -YEARS], ids=["forward", "back"])
def jump(request: pytest.FixtureRequest) -> float:
    return float(request.param)


class Clock:
    now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("cache.disk", "node.mirror.access"):
        monkeypatch.setattr(f"{module}.time.time", clock)
    return clock


def test_the_disk_keeps_the_order_of_use(tmp_path: Path, clock: Clock, jump: float) -> None:
    """Pieces age by a clock that does not jump, and the stored order does not depend on the date."""
    blobs = [Blob.random(seed, 4096) for seed in range(4)]

    async def main() -> None:
        async with DiskStore.open(tmp_path, 1 << 20) as store:
            for blob in blobs[:3]:
                assert await store.put(blob.pieces[0], blob.content, blob.record(blob.pieces[0]))
            clock.now += jump
            assert await store.put(blobs[3].pieces[0], blobs[3].content, blobs[3].record(blobs[3].pieces[0]))
            assert await store.get(blobs[0].pieces[0])
            assert store.statistics().entries == 4
        async with DiskStore.open(tmp_path, 2 * 4096) as store:
            assert [store.holds(blob.pieces[0]) for blob in blobs] == [True, False, False, True]

    trio.run(main)


def test_a_name_is_asked_for_again(tmp_path: Path, clock: Clock, jump: float) -> None:
    table = NameTable(tmp_path / "names.sqlite", clock)
    table.put(str(APP), "latest", RESOLVED)
    clock.now += jump
    row = table.get(str(APP), "latest")
    assert row is not None
    assert row.age_s >= min(YEARS, 1e9)
    table.put(str(APP), "latest", RESOLVED)
    row = table.get(str(APP), "latest")
    assert row is not None
    assert row.age_s == 0
    table.close()


def test_no_repository_becomes_public_by_a_jump(tmp_path: Path, clock: Clock, jump: float) -> None:
    table = PublicTable(tmp_path / "access.sqlite")
    table.note(APP)
    assert table.age(APP) == 0
    clock.now += jump
    assert table.age(APP) in (None, YEARS)
    table.note(APP)
    assert table.age(APP) == 0
    table.close()
    again = PublicTable(tmp_path / "access.sqlite")
    assert again.age(APP) == 0
    again.close()


def test_the_uplinks_day_begins_anew(clock: Clock, jump: float) -> None:
    def check() -> None:
        uplink = Uplink("docker.io", UplinkPolicy(daily=1000), clock=lambda: datetime.fromtimestamp(clock.now))
        uplink.note(1000)
        assert uplink.use().spent
        clock.now += jump
        assert not uplink.use().spent
        clock.now -= jump
        assert not uplink.use().spent

    async def main() -> None:
        check()

    trio.run(main)
