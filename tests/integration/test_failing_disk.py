"""A disk that is full, fails to read, or became read-only: no wrong byte is served, and the node continues."""

from __future__ import annotations

import errno
import http.client
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import trio

from cache.disk import DiskStore
from node.runtime.sqlite import Database
from protocol.ids import BLOCK_SIZE, Shard
from tests.support.blobs import Blob
from tests.support.failing_sqlite import Calls, failing
from tests.support.faulty_origin import FaultyOrigin, content
from tests.support.mounts import fill, make_read_only, small_disk
from tests.support.processes import tail
from tests.support.remembered import Remembered
from tests.support.site import P2PD, UPSTREAM, Node, run, site

LARGE = 64 << 20
BLOBS = [Blob.random(seed, 20_000) for seed in range(4)]
LONG = Blob.random(9, BLOCK_SIZE + 10_000)
SHARD = LONG.shard(1, Shard(4, 1, 2))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 2 << 20) as folder:
        yield folder


async def put(store: DiskStore, blob: Blob) -> bool:
    return all([await store.put(piece, blob.bytes_of(piece), blob.record(piece)) for piece in blob.pieces])


async def right(store: DiskStore, blob: Blob) -> bool:
    """Whether the store holds the whole blob. The pieces that it holds must be right."""
    there = [await store.get(piece) for piece in blob.pieces]
    for held, piece in zip(there, blob.pieces, strict=True):
        assert held is None or (bytes(held.data), held.record) == (blob.bytes_of(piece), blob.record(piece))
    return None not in there


async def use(store: DiskStore, *, fills: Path, pages: int) -> None:
    """The life of a store, with only `pages` left on its disk from the second flush on."""
    assert await put(store, BLOBS[0])
    await store.flush()
    fill(fills, pages)
    await store.put(SHARD, LONG.bytes_of(SHARD), LONG.record(SHARD))
    await put(store, BLOBS[1])
    await store.flush()
    await store.discard(BLOBS[0].pieces[0])
    await store.flush()
    await put(store, LONG)
    await put(store, BLOBS[2])
    await store.flush()
    await put(store, BLOBS[0])


async def recovers(folder: Path) -> None:
    async with DiskStore.open(folder, LARGE) as store:
        for blob in (*BLOBS, LONG):
            await right(store, blob)
            assert await put(store, blob)
            assert await right(store, blob)
        await store.flush()
        allocated = sum(path.stat().st_blocks * 512 for path in (folder / "objects").rglob("*") if path.is_file())
        assert allocated == store.statistics().bytes
    async with DiskStore.open(folder, LARGE) as store:
        assert all([await right(store, blob) for blob in (*BLOBS, LONG)])


def test_full_at_every_write(disk: Path) -> None:
    """The number of free pages varies, so that each write in turn is the first to fail, at each of its pages."""

    async def scenario(pages: int) -> None:
        folder = disk / f"cache-{pages}"
        async with DiskStore.open(folder, LARGE) as store:
            await use(store, fills=disk, pages=pages)
            for blob in (*BLOBS, LONG):
                await right(store, blob)
            (disk / "ballast").unlink()
            assert await put(store, BLOBS[3])
            fill(disk, pages)
        (disk / "ballast").unlink()
        await recovers(folder)
        shutil.rmtree(folder)

    for pages in (*range(50), *range(50, 200, 7)):
        trio.run(scenario, pages)


def test_full_at_the_start(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without room for the index the store holds nothing. At the next start it opens its folder again."""

    async def scenario(pages: int) -> bool:
        fill(disk, pages)
        async with DiskStore.open(disk / "cache", LARGE, pinned=frozenset([BLOBS[0].digest])) as store:
            usable = store.statistics().budget_bytes > 0
            assert await right(store, BLOBS[0]) == usable
            assert not await put(store, Blob.random(77, 100_000)) or usable  # after an eviction
            await store.flush()
        (disk / "ballast").unlink()
        await recovers(disk / "cache")
        return usable

    trio.run(recovers, disk / "cache")
    usable = [trio.run(scenario, pages) for pages in range(24)]
    assert usable == sorted(usable)
    assert (usable[0], usable[-1]) == (False, True)
    assert "nothing is stored" in caplog.text


def test_read_only_at_the_start(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with DiskStore.open(disk / "cache", LARGE) as store:
            assert store.statistics().budget_bytes == 0
            assert not await put(store, BLOBS[0])
            assert store.open_sealed(BLOBS[0].digest) is None
            store.pin(BLOBS[0].digest)

    trio.run(recovers, disk / "cache")
    make_read_only(disk)
    trio.run(scenario)
    assert "Read-only file system): nothing is stored there" in caplog.text
    subprocess.run(["umount", str(disk)], check=True)
    trio.run(recovers, disk / "cache")


def test_read_only_in_the_middle(disk: Path) -> None:
    """Held pieces are still served. No piece is stored, and none is evicted for a put."""

    async def scenario() -> None:
        async with DiskStore.open(disk / "cache", 3 * 20_480 + 4096) as store:
            assert await put(store, BLOBS[0])
            await store.flush()
            assert await put(store, BLOBS[1])
            make_read_only(disk)
            for _ in range(2):
                assert not await put(store, BLOBS[2])
                await store.flush()
                assert await right(store, BLOBS[0])
                assert await right(store, BLOBS[1])
            await store.discard(BLOBS[0].pieces[0])
            await store.flush()
            await trio.run_process(["umount", str(disk)])
            assert await put(store, BLOBS[0])

    trio.run(scenario)
    trio.run(recovers, disk / "cache")


def test_a_disk_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    real = os.preadv
    failing = {"open": False}

    def preadv(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
        if failing["open"]:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset, *flags)

    async def scenario() -> None:
        async with DiskStore.open(tmp_path, LARGE) as store:
            assert await put(store, BLOBS[0])
            await store.flush()
            failing["open"] = True
            assert not await right(store, BLOBS[0])
            assert not store.holds(BLOBS[0].pieces[0])
            failing["open"] = False
            assert await put(store, BLOBS[0])
            assert await right(store, BLOBS[0])

    monkeypatch.setattr("cache.files.os.preadv", preadv)
    trio.run(scenario)
    assert caplog.text.count("cannot be read (Input/output error): discarded") == 1
    trio.run(recovers, tmp_path)


# SQLite's own calls fail: the index, and other tables


def at_each_call(folder: Path, before: Callable[[Path], object], work: Callable[[Path], object]) -> Iterator[Path]:
    """Yields, for each call of SQLite in `work`, the folder after that call failed, alone or with all later calls."""
    before(folder / "before")
    for on in (False, True):
        for number in count():
            copy = folder / f"{number}{'+' * on}"
            shutil.copytree(folder / "before", copy)
            calls = Calls(number, on)
            with failing(calls):
                work(copy)
            yield copy
            shutil.rmtree(copy)
            if calls.made <= number:
                break


def test_an_index_whose_calls_fail_gives_no_wrong_byte(quick: Path) -> None:
    """S-32."""

    async def work(folder: Path) -> None:
        async with DiskStore.open(folder, LARGE) as store:
            for blob in (*BLOBS, LONG):
                await right(store, blob)
            await store.discard(BLOBS[0].pieces[0])
            await store.flush()
            await put(store, BLOBS[0])
            await store.put(SHARD, LONG.bytes_of(SHARD), LONG.record(SHARD))
            await store.flush()
            await put(store, LONG)
            await store.flush()
            for blob in (*BLOBS, LONG):
                assert await right(store, blob) or not store.holds(blob.pieces[0])

    for folder in at_each_call(quick, partial(trio.run, recovers), partial(trio.run, work)):
        trio.run(recovers, folder)


def test_databases_whose_calls_fail_remember_nothing_wrong(quick: Path, caplog: pytest.LogCaptureFixture) -> None:
    """S-32."""

    def before(folder: Path) -> None:
        folder.mkdir()
        trio.run(Remembered(folder).work, 0)

    for folder in at_each_call(quick, before, lambda folder: trio.run(Remembered(folder).work, 1)):
        trio.run(Remembered(folder).check, {"identity": [], "pinned": [0, 1, 2, 3]})
    assert "names.sqlite: disk I/O error: new entries may be lost when the node stops" in caplog.text


# Databases in SQLite

SCHEMA = "CREATE TABLE IF NOT EXISTS t (k TEXT PRIMARY KEY, v BLOB);"


def remembers(database: Database, key: str) -> bool:
    return database.run("SELECT v FROM t WHERE k = ?", (key,)) == [(key.encode() * 1000,)]


def reopened_remembers(path: Path, key: str) -> bool:
    with closing(Database(path, SCHEMA)) as database:
        return remembers(database, key)


def remember(database: Database, key: str) -> None:
    database.run("INSERT OR REPLACE INTO t VALUES (?, ?)", (key, key.encode() * 1000))


def test_a_database_on_a_full_disk_loses_nothing_old(disk: Path) -> None:
    path = disk / "names.sqlite"
    database = Database(path, SCHEMA)
    remember(database, "old")
    database.close()
    for pages in range(24):
        fill(disk, pages)
        database = Database(path, SCHEMA)
        remember(database, f"new{pages}")
        database.close()
        (disk / "ballast").unlink()
        database = Database(path, SCHEMA)
        assert remembers(database, "old")
        database.close()
    assert disk.joinpath("names.sqlite").exists()


def test_a_database_on_a_read_only_disk_remembers_until_the_node_stops(disk: Path, caplog) -> None:
    path = disk / "names.sqlite"
    database = Database(path, SCHEMA)
    remember(database, "old")
    database.close()
    make_read_only(disk)
    database = Database(path, SCHEMA)
    remember(database, "new")
    assert remembers(database, "new")
    database.close()
    assert "kept only until the node stops" in caplog.text
    subprocess.run(["umount", str(disk)], check=True)
    assert reopened_remembers(path, "old")


def test_a_database_with_garbage_pages_is_replaced(tmp_path: Path, caplog) -> None:
    """The damage is detected when the pages are read, because the head of the file is right."""
    path = tmp_path / "names.sqlite"
    database = Database(path, SCHEMA)
    for number in range(50):
        remember(database, f"a{number}")
    database.close()
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)
    database = Database(path, SCHEMA)
    assert not remembers(database, "a1")
    remember(database, "a1")
    assert remembers(database, "a1")
    database.close()
    assert caplog.text.count("is damaged") == 1
    assert reopened_remembers(path, "a1")


# The daemon

SIZE = 24 * BLOCK_SIZE + 12345
SIGN = "sqlite-fails"
PROGRAM = """\
from pathlib import Path
from node.daemon import main
from tests.support.failing_sqlite import Calls, failing
class Sign(Calls):
    def fails(self):
        return Path("{sign}").exists()
with failing(Sign()):
    main()
"""
"""A daemon whose SQLite fails while the file `sign` exists."""


@pytest.fixture
def node(folder: Path) -> Iterator[tuple[Node, FaultyOrigin]]:
    """A node whose data folder is on a disk of its own."""
    with (
        FaultyOrigin(SIZE) as origin,
        site(folder / "site", origin.url, 1, start=False, memory="2MiB") as (daemon,),
        small_disk(daemon.data, 64 << 20),
    ):
        daemon.program = [sys.executable, "-c", PROGRAM.format(sign=daemon.data / SIGN)]
        try:
            daemon.start()
            yield daemon, origin
        finally:
            daemon.end()


@pytest.mark.parametrize(
    "fails",
    [make_read_only, lambda data: fill(data, 0), lambda data: (data / SIGN).touch()],
    ids=["read-only", "full", "SQLite's calls"],
)
def test_a_pull_continues_without_the_disk(node: tuple[Node, FaultyOrigin], fails: Callable[[Path], object]) -> None:
    """S-32."""
    daemon, origin = node
    with closing(http.client.HTTPConnection(daemon.host, daemon.mirror_port, timeout=60)) as connection:
        connection.request("GET", f"/v2/app/blobs/{origin.digest}?ns={UPSTREAM}")
        answer = connection.getresponse()
        assert answer.read(4 * BLOCK_SIZE) == content(0, 4 * BLOCK_SIZE)
        fails(daemon.data)
        assert answer.read() == content(4 * BLOCK_SIZE, SIZE)
    for _ in range(2):
        assert pulled(daemon, origin) == content(0, SIZE)
        daemon.stop()
        daemon.start()
    checks = daemon.ctl("doctor").stdout
    assert str(daemon.data) in checks
    assert daemon.stop() == 0
    assert "Traceback" not in (log := tail(daemon.log, 10_000))
    assert "disk: " in log, "the log names the part that failed"


def pulled(node: Node, origin: FaultyOrigin) -> bytes:
    with closing(http.client.HTTPConnection(node.host, node.mirror_port, timeout=60)) as connection:
        connection.request("GET", f"/v2/app/blobs/{origin.digest}?ns={UPSTREAM}")
        return connection.getresponse().read()


def test_a_cache_of_an_older_version_is_reported_and_left_unchanged(folder: Path) -> None:
    daemon = Node("node-1", "127.0.0.1", folder / "node", "http://127.0.0.1:9")
    index = daemon.data / "cache" / "index.sqlite"
    index.parent.mkdir(parents=True)
    with closing(sqlite3.connect(index)) as database:
        database.executescript("CREATE TABLE piece (x); PRAGMA user_version = 1")
    before = index.read_bytes()
    answer = run([*P2PD, "--config", str(daemon.config)])
    assert answer.returncode == 2
    assert f"remove the folder {index.parent}, which is only a cache" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert index.read_bytes() == before
    shutil.rmtree(index.parent)
    daemon.start()
    assert daemon.stop() == 0
