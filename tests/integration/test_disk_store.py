"""The disk store against real files: altered, lost, full, killed, and opened by others."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import trio

from cache.disk import DiskStore
from cache.disk_migration import SCHEMA
from cache.pieces import REFERENCES
from cache.recovery import relative_path
from protocol.errors import BadInputError
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, PeerId, Piece, Shard
from tests.support.blobs import Blob

ROOT = Path(__file__).parents[2]
BLOB = Blob.random(1, 3 * BLOCK_SIZE + 5000)
OTHER = Blob.random(2, BLOCK_SIZE)
SHARD = Shard(4, 1, 2)
LARGE = 64 << 20


async def put(store: DiskStore, blob: Blob, piece: Piece) -> bool:
    return await store.put(piece, blob.bytes_of(piece), blob.record(piece), blob.proof(piece))


async def put_all(store: DiskStore, blob: Blob) -> None:
    for piece in blob.pieces:
        assert await put(store, blob, piece)


async def got(store: DiskStore, blob: Blob, piece: Piece) -> bool:
    held = await store.get(piece)
    expected = blob.bytes_of(piece), blob.record(piece), blob.proof(piece)
    assert held is None or (bytes(held.data), held.record, held.proof) == expected
    return held is not None


def run(folder: Path, test: Callable[[DiskStore], Awaitable[None]], budget: int = LARGE, **floor: float) -> None:
    async def main() -> None:
        async with DiskStore.open(folder, budget, **floor) as store:
            await test(store)

    trio.run(main)


def path_of(folder: Path, blob: Blob, shard: Shard | None = None) -> Path:
    return folder / relative_path(blob.digest, shard)


def rows(folder: Path) -> int:
    with sqlite3.connect(folder / "index.sqlite") as database:
        return int(database.execute("SELECT count(*) FROM piece").fetchone()[0])


def keep_rows(folder: Path, blocks: set[int]) -> None:
    """Delete the rows of all pieces but some blocks of BLOB, as a kill before the flush would."""
    kept = ", ".join(map(str, blocks))
    content = msgspec.msgpack.encode([(0, 0, 0, sum(1 << block for block in blocks))])
    with sqlite3.connect(folder / "index.sqlite") as database:
        database.execute(f"DELETE FROM piece WHERE block NOT IN ({kept}) OR digest != ?", (str(BLOB.digest),))
        database.execute("DELETE FROM run WHERE digest != ?", (str(BLOB.digest),))
        database.execute("UPDATE run SET pieces = ?", (content,))


def allocated(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in (folder / "objects").rglob("*") if path.is_file())


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


# Across a restart


def test_holds_the_same_pieces_after_a_restart(tmp_path: Path) -> None:
    async def fill(store: DiskStore) -> None:
        await put_all(store, BLOB)
        assert await put(store, OTHER, OTHER.shard(0, SHARD))

    async def check(store: DiskStore) -> None:
        for piece in BLOB.pieces:
            assert await got(store, BLOB, piece)
        assert await got(store, OTHER, OTHER.shard(0, SHARD))
        assert store.statistics().entries == 5

    run(tmp_path, fill)
    run(tmp_path, check)


def test_the_order_of_use_outlives_a_restart(tmp_path: Path) -> None:
    blobs = [Blob.random(seed, BLOCK_SIZE) for seed in range(4)]

    async def fill(store: DiskStore) -> None:
        for blob in blobs:
            await put_all(store, blob)
        await store.flush()
        assert await got(store, blobs[0], blobs[0].pieces[0])

    async def check(store: DiskStore) -> None:
        assert [store.holds(blob.pieces[0]) for blob in blobs] == [True, False, False, True]
        assert store.statistics().bytes <= store.statistics().budget_bytes

    run(tmp_path, fill)
    run(tmp_path, check, budget=2 * BLOCK_SIZE)
    assert allocated(tmp_path) == 2 * BLOCK_SIZE


def test_bytes_that_no_row_names_are_freed(tmp_path: Path) -> None:
    async def fill(store: DiskStore) -> None:
        await put_all(store, BLOB)
        await put_all(store, OTHER)

    async def check(store: DiskStore) -> None:
        assert [store.holds(piece) for piece in BLOB.pieces] == [True, False, True, False]
        assert await got(store, BLOB, BLOB.pieces[2])
        assert not store.holds(OTHER.pieces[0])

    run(tmp_path, fill)
    keep_rows(tmp_path, {0, 2})
    (tmp_path / "objects" / "README").write_text("not ours")
    run(tmp_path, check)
    assert allocated(tmp_path) - 4096 == 2 * BLOCK_SIZE
    assert path_of(tmp_path, BLOB).stat().st_size == 3 * BLOCK_SIZE
    assert not path_of(tmp_path, OTHER).exists()


def test_a_repair_logs_the_dropped_pieces(tmp_path: Path, caplog) -> None:
    async def fill(store: DiskStore) -> None:
        await put_all(store, BLOB)
        await put_all(store, OTHER)

    run(tmp_path, fill)
    os.truncate(path_of(tmp_path, BLOB), BLOCK_SIZE)
    keep_rows(tmp_path, {0, 1, 2, 3})
    run(tmp_path, lambda store: store.flush())
    assert "3 pieces are forgotten, because their bytes are missing; 1 files without pieces are removed" in caplog.text
    caplog.clear()
    run(tmp_path, lambda store: store.flush())
    assert caplog.text == ""


CHILD = """
import sys, trio
from pathlib import Path
from cache.disk import DiskStore
from protocol.ids import BLOCK_SIZE, Shard
from tests.support.blobs import Blob

async def main():
    async with DiskStore.open(Path(sys.argv[1]), 24 << 20) as store:
        for seed in range(1000):
            blob = Blob.random(seed, 2 * BLOCK_SIZE + 999)
            for piece in (*blob.pieces, blob.shard(0, Shard(4, 1, 1))):
                await store.put(piece, blob.bytes_of(piece), blob.record(piece))
            if seed == int(sys.argv[2]):
                await store.flush()
            print(seed, flush=True)

trio.run(main)
"""


@pytest.mark.parametrize("last", [3, 17])
def test_killed_in_the_middle_of_puts(tmp_path: Path, last: int, caplog) -> None:
    """Flushed pieces still exist, no byte is wrong, and the disk holds no more than the statistics report."""
    command = [sys.executable, "-c", CHILD, str(tmp_path), "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) == last:
                child.send_signal(signal.SIGKILL)
                break
    assert child.returncode == -signal.SIGKILL
    named = rows(tmp_path)

    async def check(store: DiskStore) -> None:
        statistics = store.statistics()
        assert 0 < statistics.entries <= named
        assert allocated(tmp_path) <= statistics.bytes <= statistics.budget_bytes
        if last * 2 * BLOCK_SIZE < 20 << 20:  # nothing had to be evicted: all flushed pieces exist
            for blob in (Blob.random(seed, 2 * BLOCK_SIZE + 999) for seed in range(3)):
                assert all([await got(store, blob, piece) for piece in blob.pieces])
        for digest in store.objects():
            for index in range(3):
                piece = Piece(ObjectRef(digest, 2 * BLOCK_SIZE + 999).block(index))
                held = await store.get(piece)
                assert (held is not None) == bool(store.holdings(digest).blocks >> index & 1)
                assert held is None or held.record.matches(held.data)

    run(tmp_path, check, budget=24 << 20)
    assert "not those that were put" not in caplog.text


# Altered behind our back


def alter_byte(path: Path) -> None:
    flip(path, 2 * BLOCK_SIZE - 1)


def truncate(path: Path) -> None:
    os.truncate(path, BLOCK_SIZE + 10)


def punch_zeros(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(BLOCK_SIZE)
        file.write(bytes(BLOCK_SIZE))


@pytest.mark.parametrize("damage", [alter_byte, truncate, os.unlink, punch_zeros])
@pytest.mark.parametrize("restart", [False, True])
def test_altered_bytes_are_a_miss(tmp_path: Path, damage: Callable[[Path], None], restart: bool, caplog) -> None:
    async def fill(store: DiskStore) -> None:
        await put_all(store, BLOB)
        if not restart:
            await check(store)

    async def check(store: DiskStore) -> None:
        damage(path_of(tmp_path, BLOB))
        for _ in range(2):
            assert not await got(store, BLOB, BLOB.pieces[1])
        assert not store.holds(BLOB.pieces[1])
        assert caplog.text.count(f"{BLOB.digest} #1") == 1
        assert await put(store, BLOB, BLOB.pieces[1])
        assert await got(store, BLOB, BLOB.pieces[1])
        assert await got(store, BLOB, BLOB.pieces[0]) == (damage is not os.unlink)

    async def check_after_restart(store: DiskStore) -> None:
        assert not await got(store, BLOB, BLOB.pieces[1])
        assert not store.holds(BLOB.pieces[1])
        assert await got(store, BLOB, BLOB.pieces[0]) == (damage is not os.unlink)
        assert await put(store, BLOB, BLOB.pieces[1])
        assert await got(store, BLOB, BLOB.pieces[1])

    run(tmp_path, fill)
    if restart:
        damage(path_of(tmp_path, BLOB))
        run(tmp_path, check_after_restart)


def test_altered_shards_are_a_miss(tmp_path: Path) -> None:
    async def test(store: DiskStore) -> None:
        piece = BLOB.shard(1, SHARD)
        assert await put(store, BLOB, piece)
        assert await got(store, BLOB, piece)
        flip(path_of(tmp_path, BLOB, SHARD), BLOCK_SIZE // 4)
        assert not await got(store, BLOB, piece)
        assert not store.holds(piece)

    run(tmp_path, test)


def test_the_folder_is_replaced_while_running(tmp_path: Path) -> None:
    async def test(store: DiskStore) -> None:
        await put_all(store, BLOB)
        shutil.rmtree(tmp_path / "objects")
        await put(store, OTHER, OTHER.pieces[0])
        for piece in BLOB.pieces:
            assert not await got(store, BLOB, piece)
        await store.flush()
        await put_all(store, BLOB)
        assert await got(store, BLOB, BLOB.pieces[0])

    run(tmp_path, test)


# Room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "false", "-t", "tmpfs", "-o", f"size={3 * BLOCK_SIZE}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_declines(small_disk: Path, caplog) -> None:
    async def test(store: DiskStore) -> None:
        for seed in range(6):
            blob = Blob.random(seed, BLOCK_SIZE)
            stored = await put(store, blob, blob.pieces[0])
            assert stored == await got(store, blob, blob.pieces[0])
        entries = store.statistics().entries
        assert 1 <= entries <= 2
        await store.drop_object(next(iter(store.objects())))
        await store.flush()
        assert await put(store, OTHER, OTHER.pieces[0])
        assert store.statistics().entries == entries
        assert allocated(small_disk) == store.statistics().bytes

    (small_disk / "ballast").write_bytes(bytes(BLOCK_SIZE // 2))
    run(small_disk, test)
    assert caplog.text.count("No space left on device") <= 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_error_declines_puts_and_is_logged_once(tmp_path: Path, number: int, monkeypatch, caplog) -> None:
    real = os.pwrite

    def half_then_fail(fd: int, data: memoryview, offset: int) -> int:
        if len(data) < BLOCK_SIZE:
            raise OSError(number, os.strerror(number))
        return real(fd, data[: BLOCK_SIZE // 2], offset)

    async def test(store: DiskStore) -> None:
        monkeypatch.setattr("cache.files.os.pwrite", half_then_fail)
        for piece in BLOB.pieces:
            assert not await put(store, BLOB, piece)
        assert store.statistics().entries == 0
        monkeypatch.setattr("cache.files.os.pwrite", real)
        await store.flush()
        assert store.statistics().bytes == 0
        assert allocated(tmp_path) == 0
        await put_all(store, BLOB)
        assert await got(store, BLOB, BLOB.pieces[0])

    run(tmp_path, test)
    assert caplog.text.count(os.strerror(number)) == 1


def test_the_free_disk_floor(tmp_path: Path, monkeypatch) -> None:
    """Below the floor the store evicts pieces, and then accepts no more."""
    disk = SimpleNamespace(f_bavail=100 << 8, f_blocks=1000 << 8, f_frsize=4096)  # 100 MiB of 1000 free
    monkeypatch.setattr("cache.disk_room.os.statvfs", lambda path: disk)
    clock = [0.0]

    async def main() -> None:
        async with DiskStore.open(tmp_path, LARGE, free_share=0.05, timer=lambda: clock[0]) as store:
            await put_all(store, BLOB)
            disk.f_bavail = 49 << 8
            clock[0] += 2
            assert not await put(store, OTHER, OTHER.pieces[0])
            assert store.statistics().entries <= 2
            disk.f_bavail = 90 << 8
            clock[0] += 2
            assert await put(store, OTHER, OTHER.pieces[0])

    trio.run(main)


def test_eviction_frees_the_bytes(tmp_path: Path) -> None:
    blob = Blob.random(5, 12 * BLOCK_SIZE)

    async def test(store: DiskStore) -> None:
        await put_all(store, blob)
        await store.flush()
        assert 2 <= store.statistics().entries <= 4
        assert allocated(tmp_path) == store.statistics().bytes
        assert rows(tmp_path) == store.statistics().entries

    run(tmp_path, test, budget=4 * BLOCK_SIZE)


def test_a_whole_block_replaces_its_shards(tmp_path: Path) -> None:
    async def test(store: DiskStore) -> None:
        shards = [BLOB.shard(index, Shard(4, 1, n)) for index in (0, 1) for n in (0, 4)]
        for piece in shards:
            assert await put(store, BLOB, piece)
        assert await put(store, BLOB, BLOB.pieces[0])
        assert [store.holds(piece) for piece in shards] == [False, False, True, True]
        assert not await put(store, BLOB, shards[0])
        await store.flush()
        assert allocated(tmp_path) == BLOCK_SIZE + BLOCK_SIZE // 2

    run(tmp_path, test)


# Durability


def test_rows_are_added_after_the_sync_and_removed_before_the_bytes(tmp_path: Path, monkeypatch) -> None:
    steps: list[str] = []

    def spy(module: object, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (steps.append(name), real(*a, **k))[1])

    async def test(store: DiskStore) -> None:
        spy(sys.modules["cache.disk_flush"].os, "fdatasync")
        spy(sys.modules["cache.disk_flush"], "punch")
        spy(sys.modules["cache.disk_index"].DiskIndex, "apply")
        await put_all(store, BLOB)
        await store.flush()
        await store.discard(BLOB.pieces[0])
        assert allocated(tmp_path) == store.statistics().bytes
        await store.flush()
        assert allocated(tmp_path) == store.statistics().bytes
        assert steps == ["fdatasync", "apply", "apply", "punch"]

    run(tmp_path, test)


def test_pieces_that_cannot_be_synced_are_forgotten(tmp_path: Path, monkeypatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def test(store: DiskStore) -> None:
        await put_all(store, BLOB)
        monkeypatch.setattr("cache.disk_flush.os.fdatasync", fail)
        await store.flush()
        monkeypatch.undo()
        assert store.statistics().entries == 0
        await put_all(store, OTHER)
        await store.flush()
        assert rows(tmp_path) == 1

    run(tmp_path, test)


def test_a_failing_index_loses_no_held_piece(tmp_path: Path, monkeypatch, caplog) -> None:
    def fail(*args: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    async def test(store: DiskStore) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("cache.disk_index.DiskIndex.apply", fail)
            await put_all(store, BLOB)
            for _ in range(3):
                await store.flush()
            await store.discard(BLOB.pieces[3])
            await store.flush()
            assert allocated(tmp_path) == store.statistics().bytes == 3 * BLOCK_SIZE
            assert await got(store, BLOB, BLOB.pieces[0])
            assert rows(tmp_path) == 0
        await store.flush()
        assert rows(tmp_path) == 3

    run(tmp_path, test)
    assert caplog.text.count("disk is full") == 1


def test_puts_do_not_wait_for_a_failing_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fail(*args: object) -> None:
        tries.append(args)
        raise sqlite3.OperationalError("disk I/O error")

    async def test(store: DiskStore) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("cache.disk_index.DiskIndex.apply", fail)
            for seed in range(20):
                blob = Blob.random(seed, 1000)
                assert await put(store, blob, blob.pieces[0]) == (seed < 3)
            assert len(tries) == 1
        await store.flush()
        assert await put(store, OTHER, OTHER.pieces[0])

    monkeypatch.setattr("cache.disk_flush.MAX_UNSYNCED_PIECES", 3)
    monkeypatch.setattr("cache.disk_flush.FLUSH_S", math.inf)
    run(tmp_path, test)


def test_a_cancelled_put_leaves_the_index_right(tmp_path: Path, monkeypatch) -> None:
    real = sys.modules["cache.disk_flush"].carry_out

    async def test(store: DiskStore) -> None:
        await put_all(store, BLOB)
        with trio.CancelScope() as scope:

            def cancel_and_carry_out(*args: object) -> object:
                trio.from_thread.run_sync(scope.cancel)
                return real(*args)

            monkeypatch.setattr("cache.disk_flush.carry_out", cancel_and_carry_out)
            await put(store, OTHER, OTHER.pieces[0])
            await trio.sleep_forever()
        monkeypatch.undo()
        assert scope.cancelled_caught
        await store.flush()
        assert rows(tmp_path) == store.statistics().entries
        assert allocated(tmp_path) == store.statistics().bytes
        assert await put(store, OTHER, OTHER.pieces[0])

    run(tmp_path, test, budget=3 * BLOCK_SIZE + 8192)


# The folder and its index


def test_two_stores_never_share_a_folder(tmp_path: Path) -> None:
    async def test(store: DiskStore) -> None:
        await put_all(store, OTHER)
        with pytest.raises(BadInputError, match=str(tmp_path)):
            async with DiskStore.open(tmp_path, LARGE):
                pass

    run(tmp_path, test)
    run(tmp_path, lambda store: got(store, OTHER, OTHER.pieces[0]))


@pytest.mark.parametrize("version", [SCHEMA + 1, 0])
def test_refuses_an_index_that_it_does_not_know(tmp_path: Path, version: int) -> None:
    with sqlite3.connect(tmp_path / "index.sqlite") as database:
        database.execute("CREATE TABLE something (x)")
        database.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(BadInputError, match=r"schema version .*index|index.*schema version"):
        run(tmp_path, lambda store: store.flush())
    assert sqlite3.connect(tmp_path / "index.sqlite").execute("PRAGMA user_version").fetchone() == (version,)


def test_a_shard_keeps_its_makers_proof_across_a_restart(tmp_path: Path) -> None:
    shard = BLOB.shard(1, SHARD)
    run(tmp_path, lambda store: put(store, BLOB, shard))

    async def check(store: DiskStore) -> None:
        held = await store.get(shard)
        assert held is not None
        assert held.proof is not None
        assert held.proof == BLOB.proof(shard)

    run(tmp_path, check)


def to_version_3(database: sqlite3.Connection) -> None:
    """Make the index as version 3 had it: the last use and the askers are in the row of each piece."""
    database.execute("ALTER TABLE piece ADD COLUMN used INTEGER NOT NULL DEFAULT 0")
    database.execute("ALTER TABLE piece ADD COLUMN kept_for TEXT")
    for digest, number, kept_for, used in database.execute("SELECT digest, number, kept_for, used FROM run").fetchall():
        database.execute(
            "UPDATE piece SET used = ? + block, kept_for = ? WHERE digest = ? AND block / 64 = ?",
            (used, kept_for or None, digest, number),
        )
    database.execute("DROP TABLE run")
    database.execute("PRAGMA user_version = 3")


def test_an_index_of_version_3_is_moved_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who the pieces are kept for, the order of use, and the proofs outlive it."""
    shard, kept = OTHER.shard(0, SHARD), Blob.random(3, 2 * BLOCK_SIZE)
    askers = (PeerId("12D3KooWasker"), PeerId("12D3KooWother"))

    async def fill(store: DiskStore) -> None:
        for piece in kept.pieces:
            assert await store.put(piece, kept.bytes_of(piece), kept.record(piece), kept_for=askers)
        await put_all(store, BLOB)
        await put(store, OTHER, shard)

    async def check(store: DiskStore) -> None:
        for piece in kept.pieces:
            assert await got(store, kept, piece)
            assert not store.is_used_here(piece)
        for piece in BLOB.pieces:
            assert await got(store, BLOB, piece)
            assert store.is_used_here(piece)
        assert await got(store, OTHER, shard)

    run(tmp_path, fill)
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as database:
        to_version_3(database)
        database.commit()
    run(tmp_path, check)
    assert "moved from version 3 to 4, with 3 runs" in caplog.text
    run(tmp_path, check)


def test_an_index_of_the_version_before_is_read_and_keeps_its_blocks(tmp_path: Path) -> None:
    """Its shards are dropped: their makers did not sign them."""
    shard = OTHER.shard(0, SHARD)

    async def fill(store: DiskStore) -> None:
        await put_all(store, BLOB)
        await put(store, OTHER, shard)

    run(tmp_path, fill)
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as database:
        (columns,) = database.execute("SELECT sql FROM sqlite_schema WHERE name = 'piece'").fetchone()
        to_version_3(database)
        for column in ("kept_for", "maker", "proof"):
            database.execute(f"ALTER TABLE piece DROP COLUMN {column}")
        database.execute("PRAGMA user_version = 2")
        database.commit()

    async def check(store: DiskStore) -> None:
        for piece in BLOB.pieces:
            assert await got(store, BLOB, piece)
        assert not store.holds(shard)
        assert not path_of(tmp_path, OTHER, SHARD).exists()
        await put_all(store, OTHER)

    run(tmp_path, check)
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA,)
        (now,) = database.execute("SELECT sql FROM sqlite_schema WHERE name = 'piece'").fetchone()
        assert sorted(re.findall(r"\w+", now)) == sorted(re.findall(r"\w+", columns))
    run(tmp_path, lambda store: got(store, OTHER, OTHER.pieces[0]))


@pytest.mark.parametrize("keep", [0, 100, 4096])
def test_a_damaged_index_is_moved_aside(tmp_path: Path, keep: int, caplog) -> None:
    run(tmp_path, lambda store: put_all(store, BLOB))
    index = tmp_path / "index.sqlite"
    index.write_bytes(index.read_bytes()[:keep] + b"damaged!" * 2000)

    async def check(store: DiskStore) -> None:
        assert store.statistics().entries == 0
        await put_all(store, BLOB)

    run(tmp_path, check)
    assert (tmp_path / "index.corrupt").exists()
    assert "damaged" in caplog.text
    run(tmp_path, lambda store: got(store, BLOB, BLOB.pieces[0]))


def test_malformed_rows_are_dropped(tmp_path: Path, caplog) -> None:
    run(tmp_path, lambda store: put_all(store, BLOB))
    with sqlite3.connect(tmp_path / "index.sqlite") as database:
        database.execute("UPDATE piece SET record = x'00' WHERE block = 0")
        database.execute("UPDATE piece SET k = 7 WHERE block = 1")
        database.execute("DELETE FROM piece WHERE block = 2")

    async def check(store: DiskStore) -> None:
        assert [await got(store, BLOB, piece) for piece in BLOB.pieces] == [False, False, False, True]
        assert [store.holds(piece) for piece in BLOB.pieces] == [False, False, False, True]
        await put_all(store, BLOB)

    run(tmp_path, check)
    run(tmp_path, lambda store: got(store, BLOB, BLOB.pieces[0]))


@pytest.mark.parametrize(
    "change",
    [
        "digest = 'sha256:../../etc'",
        "pieces = x'00'",
        "pieces = x'919400000011'",  # a fifth block
        "pieces = x'919407ff0003'",  # no such code
        "pieces = x'919407010901'",  # no such shard
        "number = -1",
        "number = 1",
        "size = -1",
    ],
)
def test_malformed_runs_are_dropped(tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, lambda store: put_all(store, BLOB))
    with sqlite3.connect(tmp_path / "index.sqlite") as database:
        database.execute(f"UPDATE run SET {change}")

    async def check(store: DiskStore) -> None:
        assert store.statistics().entries == 0
        assert allocated(tmp_path) == 0
        await put_all(store, BLOB)

    run(tmp_path, check)
    assert "index: " in caplog.text
    run(tmp_path, lambda store: got(store, BLOB, BLOB.pieces[0]))


def test_names_the_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="file/cache"):
        run(tmp_path / "file" / "cache", lambda store: store.flush())


# Sealed objects


def read_sealed(store: DiskStore, digest: Digest) -> bytes | None:
    file = store.open_sealed(digest)
    if file is None:
        return None
    with file:
        return file.read()


def test_serves_a_sealed_object_as_a_file(tmp_path: Path) -> None:
    async def test(store: DiskStore) -> None:
        for piece in BLOB.pieces[:-1]:
            await put(store, BLOB, piece)
        assert not store.seal(BLOB.ref)
        await put(store, BLOB, BLOB.pieces[-1])
        assert read_sealed(store, BLOB.digest) is None
        assert store.seal(BLOB.ref)
        await store.flush()
        assert read_sealed(store, BLOB.digest) == BLOB.content

    run(tmp_path, test)


def test_a_change_breaks_a_seal_and_prevents_a_new_one(tmp_path: Path) -> None:
    async def test(store: DiskStore) -> None:
        await put_all(store, BLOB)
        assert store.seal(BLOB.ref)
        flip(path_of(tmp_path, BLOB), 0)
        assert read_sealed(store, BLOB.digest) is None
        assert not store.seal(BLOB.ref)
        for piece in BLOB.pieces:
            assert await got(store, BLOB, piece) == (piece != BLOB.pieces[0])
        await store.flush()
        assert await put(store, BLOB, BLOB.pieces[0])
        assert not store.seal(BLOB.ref)
        for piece in BLOB.pieces:
            assert await got(store, BLOB, piece)
        assert store.seal(BLOB.ref)
        assert read_sealed(store, BLOB.digest) == BLOB.content

    run(tmp_path, test)


def test_a_change_between_two_puts_is_noticed(tmp_path: Path) -> None:
    async def test(store: DiskStore) -> None:
        for piece in BLOB.pieces[:2]:
            await put(store, BLOB, piece)
        flip(path_of(tmp_path, BLOB), 0)
        for piece in BLOB.pieces[2:]:
            await put(store, BLOB, piece)
        assert not store.seal(BLOB.ref)

    run(tmp_path, test)


def test_after_a_restart_each_block_is_read_before_the_seal(tmp_path: Path) -> None:
    async def check(store: DiskStore) -> None:
        assert not store.seal(BLOB.ref)
        for piece in BLOB.pieces:
            assert not store.seal(BLOB.ref)
            assert await got(store, BLOB, piece)
        assert store.seal(BLOB.ref)

    run(tmp_path, lambda store: put_all(store, BLOB))
    run(tmp_path, check)


def test_an_object_is_not_removed_while_it_is_read(tmp_path: Path) -> None:
    async def test(store: DiskStore) -> None:
        await put_all(store, BLOB)
        assert store.seal(BLOB.ref)
        file = store.open_sealed(BLOB.digest)
        assert file is not None
        with file:
            for seed in range(10, 20):
                blob = Blob.random(seed, BLOCK_SIZE)
                await put(store, blob, blob.pieces[0])
                assert store.statistics().bytes <= 6 * BLOCK_SIZE
            assert all(store.holds(piece) for piece in BLOB.pieces)
            await store.drop_object(BLOB.digest)
            await store.flush()
            assert not await put(store, BLOB, BLOB.pieces[0])
            assert file.read() == BLOB.content
            assert store.open_sealed(BLOB.digest) is None
            assert store.statistics().bytes > 3 * BLOCK_SIZE
        await store.drop_object(BLOB.digest)
        await store.flush()
        assert allocated(tmp_path) == store.statistics().bytes
        assert not path_of(tmp_path, BLOB).exists()
        assert await put(store, BLOB, BLOB.pieces[0])

    run(tmp_path, test, budget=6 * BLOCK_SIZE)


def test_opening_a_sealed_object_refers_to_its_blocks(tmp_path: Path) -> None:
    clock = [0.0]

    async def main() -> None:
        async with DiskStore.open(tmp_path, 6 * BLOCK_SIZE, timer=lambda: clock[0]) as store:
            await put_all(store, BLOB)
            assert store.seal(BLOB.ref)
            for _ in range(REFERENCES - 1):
                clock[0] += 3600
                assert read_sealed(store, BLOB.digest) == BLOB.content
            for seed in range(10, 20):
                clock[0] += 3600
                blob = Blob.random(seed, BLOCK_SIZE)
                assert await put(store, blob, blob.pieces[0])
            assert read_sealed(store, BLOB.digest) == BLOB.content

    trio.run(main)


# Pins, and what gc removes


def pinned_blob(number: int) -> Blob:
    return Blob.random(number, 2 * BLOCK_SIZE)


@pytest.mark.parametrize("punching", [True, False])
def test_pinned_pieces_outlive_eviction_and_a_restart_with_less_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, punching: bool
) -> None:
    if not punching:
        monkeypatch.setattr("cache.recovery.can_punch", lambda directory: False)
    kept, budget = pinned_blob(1), 8 * BLOCK_SIZE

    async def main() -> None:
        async with DiskStore.open(tmp_path, budget) as store:
            await put_all(store, kept)
            store.pin(kept.digest)
            for number in range(2, 12):
                await put_all(store, pinned_blob(number))
            assert all([await got(store, kept, piece) for piece in kept.pieces])
            figures = store.statistics()
            assert (figures.pinned_bytes, figures.bytes <= budget) == (2 * BLOCK_SIZE, True)
        async with DiskStore.open(tmp_path, 3 * BLOCK_SIZE, pinned=frozenset([kept.digest])) as store:
            assert all([await got(store, kept, piece) for piece in kept.pieces])
            assert store.statistics().entries <= 3
            store.unpin(kept.digest)
            await put_all(store, pinned_blob(20))
            assert store.statistics().pinned_bytes == 0
            assert not all(store.holds(piece) for piece in kept.pieces)

    trio.run(main)


def test_a_store_full_of_pins_declines(tmp_path: Path) -> None:
    kept = pinned_blob(1)

    async def test(store: DiskStore) -> None:
        store.pin(kept.digest)
        await put_all(store, kept)
        assert not await put(store, OTHER, OTHER.pieces[0])
        assert all(store.holds(piece) for piece in kept.pieces)

    run(tmp_path, test, budget=2 * BLOCK_SIZE)


def test_unused_pieces_are_reported_and_removed_except_pinned_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, kept, young = pinned_blob(1), pinned_blob(2), pinned_blob(3)
    clock = [1_000_000.0]
    monkeypatch.setattr("cache.disk.time.time", lambda: clock[0])

    async def first(store: DiskStore) -> None:
        await put_all(store, old)
        await put_all(store, kept)
        store.pin(kept.digest)
        clock[0] += 3600
        await put_all(store, young)

    async def second(store: DiskStore) -> None:
        store.pin(kept.digest)
        unused = list(store.unused(1800))
        assert set(unused) == set(old.pieces)
        before = store.statistics()
        assert await store.remove(unused, dry_run=True) == (2, 2 * BLOCK_SIZE)
        assert store.statistics() == before
        assert await store.remove(unused) == (2, 2 * BLOCK_SIZE)
        assert store.statistics().bytes == 4 * BLOCK_SIZE
        assert set(store.beyond(0)) == set(young.pieces)
        assert await store.remove(kept.pieces) == (0, 0)

    run(tmp_path, first)
    run(tmp_path, second)
