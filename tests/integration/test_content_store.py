"""containerd's content store, as files on a real file system."""

from __future__ import annotations

import os
from hashlib import sha512
from pathlib import Path

import pytest
import trio
import trio.testing

from cache import content_store
from cache.content_store import ContentStore
from protocol.ids import BLOCK_SIZE, BlockId, Digest, ObjectRef, Piece
from protocol.records import Record, make_record
from tests.support.blobs import SIGNER, Blob

BLOB = Blob.random(1, 2 * BLOCK_SIZE + 300)
SMALL = Blob.random(2, 700)


class World:
    """A store, its clock, and the blocks for which it requested records."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 0.0
        self.signed: list[tuple[ObjectRef, int]] = []
        self.store = ContentStore(root, record_for=self.record_for, timer=lambda: self.now)

    def record_for(self, ref: ObjectRef, index: int, sha: bytes) -> Record:
        self.signed.append((ref, index))
        return make_record(ref, index, sha, SIGNER, sign=lambda payload: bytes(64))

    def path(self, digest: Digest) -> Path:
        return self.root / "blobs" / digest.algorithm / digest.hex

    def write(self, digest: Digest, content: bytes) -> None:
        self.path(digest).parent.mkdir(parents=True, exist_ok=True)
        self.path(digest).write_bytes(content)
        self.now += 60

    async def read(self, blob: Blob) -> bytes | None:
        held = [await self.store.get(piece) for piece in blob.pieces]
        assert all(part is None or part.record.matches(part.data) for part in held)
        return b"".join(bytes(part.data) for part in held if part) if all(held) else None


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.write(BLOB.digest, BLOB.content)
    return world


def count_hashed(monkeypatch) -> list[Digest]:
    checked: list[Digest] = []
    examine = content_store.examine

    def spy(fd: int, digest: Digest) -> object:
        checked.append(digest)
        return examine(fd, digest)

    monkeypatch.setattr(content_store, "examine", spy)
    return checked


def test_reads_blobs_of_containerd_and_verifies_each_once(world: World, monkeypatch) -> None:
    checked = count_hashed(monkeypatch)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(world.read, BLOB)
        assert await world.read(BLOB) == BLOB.content

    trio.run(main)
    assert checked == [BLOB.digest]
    assert sorted(index for _, index in world.signed) == [0, 1, 2]
    assert {ref for ref, _ in world.signed} == {BLOB.ref}


def test_other_algorithms(world: World) -> None:
    digest = Digest("sha512", sha512(SMALL.content).hexdigest())
    world.write(digest, SMALL.content)

    async def main() -> None:
        held = await world.store.get(Piece(BlockId(digest, 0)))
        assert held is not None
        assert bytes(held.data) == SMALL.content
        assert set(world.store.objects()) == {BLOB.digest, digest}

    trio.run(main)


def test_a_missing_folder_counts_as_empty_and_is_logged_once(tmp_path: Path, caplog) -> None:
    world = World(tmp_path / "nowhere")

    async def main() -> None:
        assert await world.read(BLOB) is None
        assert not world.store.has_object(BLOB.digest)
        assert list(world.store.objects()) == []
        assert not await world.store.check(BLOB.digest)
        world.write(BLOB.digest, BLOB.content)
        assert await world.read(BLOB) == BLOB.content
        assert list(world.store.objects()) == [BLOB.digest]

    trio.run(main)
    assert caplog.text.count("nowhere") == 1


def test_a_wrong_blob_is_absent_until_it_changes(world: World, monkeypatch, caplog) -> None:
    checked = count_hashed(monkeypatch)
    world.write(BLOB.digest, b"x" + BLOB.content[1:])

    async def main() -> None:
        assert world.store.has_object(BLOB.digest)
        for _ in range(3):
            assert await world.read(BLOB) is None
            assert world.store.size_of(BLOB.digest) is None
            assert not world.store.holds(BLOB.pieces[0])
            assert world.store.holdings(BLOB.digest).blocks == 0
            world.now += 60
        assert list(world.store.objects()) == []
        assert len(checked) == 1
        world.write(BLOB.digest, BLOB.content)
        assert await world.read(BLOB) == BLOB.content

    trio.run(main)
    assert caplog.text.count(str(BLOB.digest)) == 1


@pytest.mark.parametrize("content", [BLOB.content[:-1], BLOB.content + b"x", b"y" * len(BLOB.content), b""])
def test_a_change_after_the_check_is_noticed(world: World, content: bytes) -> None:
    async def main() -> None:
        assert await world.read(BLOB) == BLOB.content
        file = world.store.open_sealed(BLOB.digest)
        assert file is not None
        file.close()
        world.write(BLOB.digest, content)
        assert world.store.open_sealed(BLOB.digest) is None
        for piece in BLOB.pieces:
            assert await world.store.get(piece) is None
        assert not await world.store.check(BLOB.digest)
        world.path(BLOB.digest).unlink()
        world.now += 60
        assert world.store.size_of(BLOB.digest) is None
        assert await world.read(BLOB) is None

    trio.run(main)


def test_a_file_is_sealed_once_it_was_checked(world: World) -> None:
    async def main() -> None:
        assert world.store.open_sealed(BLOB.digest) is None
        assert await world.store.check(BLOB.digest)
        file = world.store.open_sealed(BLOB.digest)
        assert file is not None
        world.path(BLOB.digest).unlink()
        with file:
            assert file.read() == BLOB.content
        assert world.store.open_sealed(BLOB.digest) is None

    trio.run(main)


def test_only_plain_files_with_the_name_of_a_digest_are_blobs(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "blobs" / "sha256"
    (folder / SMALL.digest.hex).symlink_to(world.path(BLOB.digest))
    (folder / ("a" * 64)).mkdir()
    os.mkfifo(folder / ("b" * 64))
    (folder / "ingest-1").write_bytes(b"")

    async def main() -> None:
        assert list(world.store.objects()) == [BLOB.digest]
        for name in (SMALL.digest.hex, "a" * 64, "b" * 64):
            assert not world.store.has_object(Digest("sha256", name))
            assert not await world.store.check(Digest("sha256", name))

    trio.run(main)


def test_a_check_can_be_cancelled_and_the_next_one_goes_through(world: World, monkeypatch) -> None:
    monkeypatch.setattr("cache.content_store.CHECK_BYTES", BLOCK_SIZE)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            first = trio.CancelScope()
            done = trio.Event()

            async def cancelled() -> None:
                with first:
                    await world.store.check(BLOB.digest)
                done.set()

            nursery.start_soon(cancelled)
            await trio.testing.wait_all_tasks_blocked()
            first.cancel()
            assert await world.read(BLOB) == BLOB.content
            await done.wait()

    trio.run(main)
