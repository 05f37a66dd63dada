"""The disk store beside the loop: pieces that wait for their write, and files that are compared while it serves."""

from __future__ import annotations

import errno
import math
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from cache.disk import DiskStore
from cache.recovery import relative_path
from protocol.ids import BLOCK_SIZE, PeerId, Piece, Shard
from protocol.records import Record
from tests.support.blobs import SIGNER, Blob

BLOB = Blob.random(1, 3 * BLOCK_SIZE + 5000)
OTHER = Blob.random(2, BLOCK_SIZE)
LARGE = 64 << 20
ASKER = PeerId("12D3KooWasker")


class Gate:
    """Holds the thread that writes until it is opened. `at` is set once it is there."""

    def __init__(self) -> None:
        self.at, self.way = threading.Event(), threading.Event()
        self.error: OSError | None = None

    async def wait_at(self) -> None:
        await trio.to_thread.run_sync(self.at.wait)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, module = Gate(), sys.modules["cache.disk_flush"]
    real = module.write_all

    def held(*arguments: object) -> object:
        gate.at.set()
        gate.way.wait()
        return real(*arguments)

    def write(fd: int, data: bytes, offset: int) -> None:
        if gate.error is not None:
            raise gate.error
        assert os.pwrite(fd, data, offset) == len(data)

    monkeypatch.setattr(module, "write_all", held)
    monkeypatch.setattr(module, "write_at", write)
    yield gate
    gate.way.set()


def put(store: DiskStore, blob: Blob, piece: Piece) -> bool:
    return store.put_nowait(piece, blob.bytes_of(piece), blob.record(piece), blob.proof(piece))


async def got(store: DiskStore, blob: Blob, piece: Piece) -> bool:
    held = await store.get(piece)
    expected = blob.bytes_of(piece), blob.record(piece), blob.proof(piece)
    assert held is None or (bytes(held.data), held.record, held.proof) == expected
    return held is not None


def run(folder: Path, test: Callable[[DiskStore], Awaitable[None]], budget: int = LARGE) -> None:
    async def main() -> None:
        async with DiskStore.open(folder, budget) as store:
            await test(store)

    trio.run(main)


def allocated(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in (folder / "objects").rglob("*") if path.is_file())


def test_a_piece_is_served_while_it_waits_for_its_write(tmp_path: Path, gate: Gate) -> None:
    shard = OTHER.shard(0, Shard(4, 1, 2))

    async def test(store: DiskStore) -> None:
        assert put(store, OTHER, shard)
        await gate.wait_at()
        for piece in BLOB.pieces:
            assert put(store, BLOB, piece)
        for piece in BLOB.pieces:
            assert await got(store, BLOB, piece)
        assert await got(store, OTHER, shard)
        assert await store.signed_by(SIGNER, BLOB.digest) == {piece: BLOB.record(piece) for piece in BLOB.pieces}
        assert store.statistics().bytes == 3 * BLOCK_SIZE + 8192 + BLOCK_SIZE // 4
        assert allocated(tmp_path) == 0
        gate.way.set()
        await store.flush()
        assert allocated(tmp_path) == store.statistics().bytes
        for piece in BLOB.pieces:
            assert await got(store, BLOB, piece)

    run(tmp_path, test)


def test_a_piece_that_is_discarded_before_its_write_leaves_nothing(tmp_path: Path, gate: Gate) -> None:
    """Neither one that is being written, nor one that waits. Who waited for its write goes on."""

    async def test(store: DiskStore) -> None:
        assert put(store, OTHER, OTHER.pieces[0])
        await gate.wait_at()
        async with trio.open_nursery() as nursery:
            for piece in BLOB.pieces[:2]:
                nursery.start_soon(store.put, piece, BLOB.bytes_of(piece), BLOB.record(piece))
            await trio.testing.wait_all_tasks_blocked()
            assert store.statistics().entries == 3
            for piece in (*OTHER.pieces, *BLOB.pieces):
                await store.discard(piece)
            assert store.statistics().entries == 0
            assert not put(store, OTHER, OTHER.pieces[0]), "its old bytes are still being written"
            gate.way.set()
        await store.flush()
        assert store.statistics().bytes == allocated(tmp_path) == 0
        assert put(store, OTHER, OTHER.pieces[0])
        await store.flush()
        assert await got(store, OTHER, OTHER.pieces[0])

    run(tmp_path, test)


def test_a_write_that_fails_makes_the_piece_absent(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(store: DiskStore) -> None:
        gate.error = OSError(errno.ENOSPC, "No space left on device")
        assert put(store, BLOB, BLOB.pieces[0])
        assert await got(store, BLOB, BLOB.pieces[0])
        gate.way.set()
        await store.flush()
        assert not store.holds(BLOB.pieces[0])
        assert not await store.put(BLOB.pieces[1], BLOB.bytes_of(BLOB.pieces[1]), BLOB.record(BLOB.pieces[1]))
        gate.error = None
        await store.flush()
        assert store.statistics().bytes == 0
        assert put(store, BLOB, BLOB.pieces[0])

    run(tmp_path, test)
    assert caplog.text.count("No space left on device") == 1


def test_the_bytes_that_wait_are_bounded(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.disk_flush.MAX_QUEUED_BYTES", 2 * BLOCK_SIZE)

    async def test(store: DiskStore) -> None:
        assert put(store, OTHER, OTHER.pieces[0])
        await gate.wait_at()
        assert [put(store, BLOB, piece) for piece in BLOB.pieces] == [True, True, False, False]
        assert not store.holds(BLOB.pieces[2])
        done = []

        async def wait() -> None:
            assert await store.put(BLOB.pieces[2], BLOB.bytes_of(BLOB.pieces[2]), BLOB.record(BLOB.pieces[2]))
            done.append(True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert not done
            gate.way.set()
        assert all([await got(store, BLOB, piece) for piece in BLOB.pieces[:3]])

    run(tmp_path, test)


def test_an_object_is_sealed_once_its_last_block_is_written(tmp_path: Path, gate: Gate) -> None:
    async def test(store: DiskStore) -> None:
        for piece in BLOB.pieces:
            assert put(store, BLOB, piece)
        assert not store.seal(BLOB.ref)
        assert store.open_sealed(BLOB.digest) is None
        gate.way.set()
        await store.flush()
        file = store.open_sealed(BLOB.digest)
        assert file is not None
        with file:
            assert file.read() == BLOB.content

    run(tmp_path, test)


def test_a_kill_loses_the_pieces_that_wait_and_no_other(tmp_path: Path, gate: Gate) -> None:
    """Leaving the store writes all: a kill is a copy of the folder before."""

    async def test(store: DiskStore) -> None:
        gate.way.set()
        assert put(store, OTHER, OTHER.pieces[0])
        await store.flush()
        gate.way.clear()
        gate.at.clear()
        for piece in BLOB.pieces:
            assert put(store, BLOB, piece)
        await gate.wait_at()
        await trio.run_process(["cp", "-a", str(tmp_path / "cache"), str(tmp_path / "copy")])
        gate.way.set()

    async def check(store: DiskStore) -> None:
        assert await got(store, OTHER, OTHER.pieces[0])
        assert list(store.objects()) == [OTHER.digest]
        assert allocated(tmp_path / "copy") == store.statistics().bytes == BLOCK_SIZE

    run(tmp_path / "cache", test)
    run(tmp_path / "copy", check)


# Files are compared with the index


@pytest.mark.parametrize("at_once", [0, 4096])
def test_files_are_compared_also_while_the_store_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at_once: int
) -> None:
    lost = [Blob.random(seed, 2 * BLOCK_SIZE) for seed in range(10, 14)]

    async def fill(store: DiskStore) -> None:
        for blob in (BLOB, *lost):
            for piece in blob.pieces:
                assert await store.put(piece, blob.bytes_of(piece), blob.record(piece))

    async def check(store: DiskStore) -> None:
        assert put(store, OTHER, OTHER.pieces[0])
        await store.compared.wait()
        await store.flush()
        assert [store.holds(blob.pieces[0]) for blob in lost] == [False, True, True, True]
        assert [store.holds(blob.pieces[1]) for blob in lost] == [False, False, True, True]
        assert await got(store, OTHER, OTHER.pieces[0])
        assert allocated(tmp_path) == store.statistics().bytes == 9 * BLOCK_SIZE + 8192

    run(tmp_path, fill)
    (tmp_path / relative_path(lost[0].digest, None)).unlink()
    os.truncate(tmp_path / relative_path(lost[1].digest, None), BLOCK_SIZE)
    with (tmp_path / relative_path(lost[2].digest, Shard(4, 1, 0))).open("wb") as file:
        file.write(bytes(9000))
    with (tmp_path / relative_path(lost[3].digest, None)).open("ab") as file:
        file.write(bytes(9000))
    monkeypatch.setattr("cache.disk.AT_ONCE", at_once)
    run(tmp_path, check)
    assert "3 pieces are forgotten, because their bytes are missing; 1 files without pieces are removed" in caplog.text


def test_a_store_of_many_small_objects_says_that_their_number_bounds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cache.disk_room.MAX_RUNS", 4)
    monkeypatch.setattr("cache.disk.MAX_RUNS", 4)
    blobs = [Blob.random(seed, 100) for seed in range(10)]

    async def test(store: DiskStore) -> None:
        for blob in blobs:
            assert await store.put(blob.pieces[0], blob.content, blob.record(blob.pieces[0]))
        assert store.statistics().entries <= 4
        assert store.holds(blobs[-1].pieces[0])

    run(tmp_path, test)
    assert caplog.text.count("the cache does not fill its budget") == 1


def test_a_much_smaller_budget_is_reached_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.disk_room.MAX_STEP", 2 * BLOCK_SIZE)
    blob = Blob.random(5, 20 * BLOCK_SIZE)

    async def test(store: DiskStore) -> None:
        for piece in blob.pieces:
            assert put(store, blob, piece) or await store.put(piece, blob.bytes_of(piece), blob.record(piece))
        await store.flush()
        store.resize(4 * BLOCK_SIZE)
        while store.statistics().bytes > 4 * BLOCK_SIZE:
            await trio.testing.wait_all_tasks_blocked()
            await store.flush()
        assert 2 <= store.statistics().entries <= 4
        assert store.holds(blob.pieces[-1])

    run(tmp_path, test)


def test_a_floor_that_cannot_be_kept_costs_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More free disk is demanded than there is, and all that is held is pinned: no flush follows at once."""
    monkeypatch.setattr("cache.disk_flush.FLUSH_S", math.inf)

    async def test(store: DiskStore) -> None:
        store.pin(OTHER.digest)
        assert put(store, OTHER, OTHER.pieces[0])
        await store.flush()
        store.resize(LARGE, free_bytes=1 << 60)
        assert not store.seal(BLOB.ref)
        assert store.seal(OTHER.ref), "a flush is due"
        with trio.fail_after(20):
            await trio.testing.wait_all_tasks_blocked(0.2)
        assert store.holds(OTHER.pieces[0])

    run(tmp_path, test)


def test_objects_of_two_sizes_under_one_digest_are_held_beside_each_other(tmp_path: Path) -> None:
    """A member may sign a false size. The lengths of the pieces are those of their own records."""
    false = msgspec.structs.replace(OTHER.record(OTHER.pieces[0]), size=BLOCK_SIZE + 700, index=1, length=700)
    piece, data = Piece(false.block), bytes(700)
    false = Record(false.digest, 1, 700, false.size, sha256=sha256(data).digest(), signer=SIGNER, signature=bytes(64))

    async def fill(store: DiskStore) -> None:
        assert put(store, OTHER, OTHER.pieces[0])
        assert await store.put(piece, data, false)
        await store.flush()

    async def check(store: DiskStore) -> None:
        assert await got(store, OTHER, OTHER.pieces[0])
        held = await store.get(piece)
        assert held is not None
        assert (bytes(held.data), held.record) == (data, false)
        assert store.statistics().bytes == BLOCK_SIZE + 4096
        assert not store.seal(OTHER.ref)
        await store.drop_object(OTHER.digest)
        await store.flush()
        assert store.statistics().bytes == allocated(tmp_path) == 0

    run(tmp_path, fill)
    run(tmp_path, check)
