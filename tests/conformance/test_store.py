"""The promises of every store (cache/store.py)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from cache.content_store import ContentStore
from cache.disk import DiskStore
from cache.memory import ENTRY_BYTES, MemoryStore
from cache.pieces import REFERENCES
from cache.store import READ_HERE, Askers, BlockStore, Holdings
from protocol.errors import BadInputError
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, PeerId, Piece, Shard
from protocol.records import Record, make_record
from tests.support.blobs import SIGNER, Blob

BUDGET = 4 * (BLOCK_SIZE + 2 * ENTRY_BYTES)
"""Room for four whole blocks but not for five, in memory and on disk."""

BLOB = Blob.random(1, 3 * BLOCK_SIZE + 5000)
DATA = Shard(4, 1, 2)
PARITY = Shard(3, 1, 3)

ASKER, OTHER = PeerId("12D3KooWasker"), PeerId("12D3KooWother")

Open = Callable[[], AbstractAsyncContextManager[BlockStore]]


class Timer:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def timer() -> Timer:
    return Timer()


@pytest.fixture(params=["memory", "disk", "disk without holes"])
def open_store(request, tmp_path: Path, timer: Timer, monkeypatch) -> Open:
    if request.param == "disk without holes":
        monkeypatch.setattr("cache.recovery.can_punch", lambda directory: False)
    if request.param != "memory":
        return lambda: DiskStore.open(tmp_path / "cache", BUDGET, timer=timer)

    @asynccontextmanager
    async def memory() -> AsyncIterator[BlockStore]:
        yield MemoryStore(BUDGET, timer)

    return memory


def run(open_store: Open, test: Callable[[BlockStore], Awaitable[None]]) -> None:
    async def main() -> None:
        async with open_store() as store:
            await test(store)

    trio.run(main)


async def put(store: BlockStore, blob: Blob, piece: Piece, kept_for: Askers = READ_HERE) -> bool:
    return await store.put(piece, blob.bytes_of(piece), blob.record(piece), blob.proof(piece), kept_for=kept_for)


async def got(store: BlockStore, blob: Blob, piece: Piece) -> bool:
    """Whether the store returned the piece. Its bytes must then be right."""
    held = await store.get(piece)
    assert store.holds(piece) == (held is not None)
    if held is None:
        return False
    assert (bytes(held.data), held.record, held.proof) == (blob.bytes_of(piece), blob.record(piece), blob.proof(piece))
    return True


def test_returns_the_stored_bytes(open_store: Open) -> None:
    async def test(store: BlockStore) -> None:
        pieces = [BLOB.pieces[0], BLOB.pieces[3], BLOB.shard(1, DATA), BLOB.shard(2, DATA), BLOB.shard(2, PARITY)]
        for piece in pieces:
            assert not await got(store, BLOB, piece)
            assert await put(store, BLOB, piece)
        for piece in pieces:
            assert await got(store, BLOB, piece)
        assert not store.holds(BLOB.pieces[1])
        assert not store.holds(BLOB.shard(1, PARITY))
        assert store.holdings(BLOB.digest) == Holdings(0b1001, {DATA: 0b0110, PARITY: 0b0100})
        assert list(store.objects()) == [BLOB.digest]
        assert store.statistics().entries == len(pieces)
        assert sum(len(BLOB.bytes_of(piece)) for piece in pieces) <= store.statistics().bytes <= BUDGET

    run(open_store, test)


def test_holds_no_piece_of_an_unknown_object(open_store: Open) -> None:
    async def test(store: BlockStore) -> None:
        assert await store.get(BLOB.pieces[0]) is None
        assert not store.holds(BLOB.pieces[0])
        assert store.holdings(BLOB.digest) == Holdings()
        assert list(store.objects()) == []
        assert (store.statistics().bytes, store.statistics().entries) == (0, 0)

    run(open_store, test)


def test_putting_twice_changes_nothing(open_store: Open) -> None:
    async def test(store: BlockStore) -> None:
        for piece in (BLOB.pieces[0], BLOB.shard(1, DATA)):
            assert await put(store, BLOB, piece)
            before = store.statistics()
            assert await put(store, BLOB, piece)
            assert store.statistics() == before

    run(open_store, test)


def test_a_put_that_does_not_wait_is_as_good_as_one_that_may(open_store: Open, timer: Timer) -> None:
    blobs = [Blob.random(seed, BLOCK_SIZE) for seed in range(60, 70)]

    async def test(store: BlockStore) -> None:
        assert isinstance(store, MemoryStore | DiskStore)
        for blob in (*blobs, *blobs[:2]):
            timer.now += 3600
            piece = blob.pieces[0]
            if not store.put_nowait(piece, blob.bytes_of(piece), blob.record(piece)):
                assert not store.holds(piece)
                assert await put(store, blob, piece)
            assert await got(store, blob, piece)
            assert store.statistics().bytes <= BUDGET
        with pytest.raises(BadInputError):
            store.put_nowait(BLOB.pieces[1], b"", BLOB.record(BLOB.pieces[1]))

    run(open_store, test)


def test_discards_one_piece_and_no_other(open_store: Open) -> None:
    async def test(store: BlockStore) -> None:
        for piece in (BLOB.pieces[0], BLOB.shard(1, DATA)):
            await put(store, BLOB, piece)
        await store.discard(BLOB.pieces[0])
        await store.discard(BLOB.pieces[2])
        assert not await got(store, BLOB, BLOB.pieces[0])
        assert await got(store, BLOB, BLOB.shard(1, DATA))
        assert await put(store, BLOB, BLOB.pieces[0])
        assert await got(store, BLOB, BLOB.pieces[0])

    run(open_store, test)


def test_lists_the_pieces_of_a_signer_without_discarded_ones(open_store: Open) -> None:
    async def test(store: BlockStore) -> None:
        kept, gone, other = BLOB.shard(1, DATA), BLOB.pieces[0], BLOB.pieces[2]
        foreign = msgspec.structs.replace(BLOB.record(other), signer=PeerId("12D3KooWother"))
        for piece in (kept, gone):
            await put(store, BLOB, piece)
        await store.discard(gone)
        await store.put(other, BLOB.bytes_of(other), foreign)
        for _ in range(2):
            assert await store.signed_by(SIGNER, BLOB.digest) == {kept: BLOB.record(kept)}
            assert await store.signed_by(foreign.signer, BLOB.digest) == {other: foreign}
            assert await store.signed_by(PeerId("12D3KooWnobody"), BLOB.digest) == {}
            assert await store.signed_by(SIGNER, Blob.random(2, 1).digest) == {}
            if isinstance(store, DiskStore):
                await store.flush()

    run(open_store, test)


def test_refuses_bytes_that_do_not_match_the_piece(open_store: Open) -> None:
    async def test(store: BlockStore) -> None:
        first, second = BLOB.pieces[:2]
        wrong = [
            (first, BLOB.bytes_of(first)[:-1], BLOB.record(first)),
            (first, BLOB.bytes_of(first), BLOB.record(second)),
            (BLOB.shard(0, DATA), BLOB.bytes_of(first), BLOB.record(first)),
            (BLOB.shard(0, Shard(4, 1, 5)), bytes(BLOCK_SIZE // 4), BLOB.record(first)),
            (BLOB.shard(0, Shard(0, 1, 0)), b"", BLOB.record(first)),
            (BLOB.shard(0, Shard(2, -1, 0)), bytes(BLOCK_SIZE // 2), BLOB.record(first)),
        ]
        for piece, data, record in wrong:
            with pytest.raises(BadInputError):
                await store.put(piece, data, record)
            assert not store.holds(piece)
        assert store.statistics().entries == 0

    run(open_store, test)


def test_evicts_rarely_used_pieces_and_keeps_the_budget(open_store: Open, timer: Timer) -> None:
    used, unused = Blob.random(2, BLOCK_SIZE), Blob.random(3, BLOCK_SIZE)

    async def test(store: BlockStore) -> None:
        for blob in (used, unused):
            assert await put(store, blob, blob.pieces[0])
        for _ in range(REFERENCES - 1):
            timer.now += 3600
            assert await got(store, used, used.pieces[0])
        for seed in range(10, 20):
            timer.now += 3600
            blob = Blob.random(seed, BLOCK_SIZE)
            assert await put(store, blob, blob.pieces[0])
            assert store.statistics().bytes <= store.statistics().budget_bytes == BUDGET
        assert await got(store, used, used.pieces[0])
        assert not await got(store, unused, unused.pieces[0])

    run(open_store, test)


def test_a_piece_kept_for_members_evicts_nothing_that_clients_use(open_store: Open) -> None:
    """S-59"""
    used = [Blob.random(seed, BLOCK_SIZE) for seed in range(40, 43)]
    kept = [Blob.random(seed, BLOCK_SIZE) for seed in range(50, 60)]

    async def test(store: BlockStore) -> None:
        assert await put(store, kept[0], kept[0].pieces[0], (ASKER,))
        for blob in used:
            assert await put(store, blob, blob.pieces[0])
        for blob in kept:
            assert await put(store, blob, blob.pieces[0], (ASKER, OTHER))
            assert store.holds(blob.pieces[0])
            assert not store.is_used_here(blob.pieces[0])
        assert all(store.is_used_here(blob.pieces[0]) for blob in used)
        assert store.statistics().entries == 4
        assert 0 < store.statistics().probation_bytes < 2 * BLOCK_SIZE
        store.claim(kept[-1].pieces[0])
        assert store.is_used_here(kept[-1].pieces[0])
        assert store.statistics().probation_bytes == 0
        assert not await put(store, kept[0], kept[0].pieces[0], (ASKER,)), "no room is left on probation"
        assert await put(store, kept[0], kept[0].pieces[0]), "a client's read makes room among what clients use"

    run(open_store, test)


def test_probation_goes_first_and_ends_with_a_put_by_a_client(open_store: Open) -> None:
    blobs = [Blob.random(seed, BLOCK_SIZE) for seed in range(40, 46)]

    async def test(store: BlockStore) -> None:
        for blob in blobs[:4]:
            assert await put(store, blob, blob.pieces[0], (ASKER,))
        assert await put(store, blobs[0], blobs[0].pieces[0])
        assert await put(store, blobs[0], blobs[0].pieces[0], (ASKER,))
        assert store.is_used_here(blobs[0].pieces[0])
        for blob in blobs[4:]:
            assert await put(store, blob, blob.pieces[0])
        assert [store.holds(blob.pieces[0]) for blob in blobs] == [True, False, False, True, True, True]

    run(open_store, test)


def test_probation_outlives_a_restart(tmp_path: Path) -> None:
    """S-59"""
    kept, claimed, read = (Blob.random(seed, BLOCK_SIZE).pieces[0] for seed in (40, 41, 42))
    blobs = {piece: Blob.random(seed, BLOCK_SIZE) for seed, piece in ((40, kept), (41, claimed), (42, read))}

    async def main() -> None:
        async with DiskStore.open(tmp_path, BUDGET) as store:
            for piece in (kept, claimed):
                assert await put(store, blobs[piece], piece, (ASKER, OTHER))
            await put(store, blobs[read], read)
            await store.flush()
            store.claim(claimed)
            await store.flush()
        async with DiskStore.open(tmp_path, BUDGET) as store:
            assert [store.is_used_here(piece) for piece in (kept, claimed, read)] == [False, True, True]
            assert store.statistics().probation_bytes == BLOCK_SIZE
        async with DiskStore.open(tmp_path, 2 * BLOCK_SIZE) as store:
            assert [store.holds(piece) for piece in (kept, claimed, read)] == [False, True, True]

    trio.run(main)


def test_a_changed_budget_is_kept_from_then_on(open_store: Open) -> None:
    async def test(store: BlockStore) -> None:
        assert isinstance(store, MemoryStore | DiskStore)
        blobs = [Blob.random(seed, BLOCK_SIZE) for seed in range(20, 29)]
        for blob in blobs[:4]:
            assert await put(store, blob, blob.pieces[0])
        store.resize(BUDGET // 2)
        assert store.statistics().budget_bytes == BUDGET // 2
        assert await put(store, blobs[4], blobs[4].pieces[0])
        assert store.statistics().bytes <= BUDGET // 2
        left = [await got(store, blob, blob.pieces[0]) for blob in blobs[:5]]
        assert (left[:3], left[4]) == ([False] * 3, True), "a disk evicts a little more than it must"
        store.resize(2 * BUDGET)
        for blob in blobs[1:]:
            assert await put(store, blob, blob.pieces[0])
        assert store.statistics().entries == 8, "twice as many as the first budget had room for"
        store.resize(0)
        assert not await put(store, blobs[0], blobs[0].pieces[0])

    run(open_store, test)


def test_declines_pieces_larger_than_the_budget(tmp_path: Path) -> None:
    async def main() -> None:
        async with DiskStore.open(tmp_path, BLOCK_SIZE - 1) as disk:
            for store in (MemoryStore(BLOCK_SIZE, trio.current_time), disk):
                assert not await put(store, BLOB, BLOB.pieces[0])
                assert not store.holds(BLOB.pieces[0])
                assert store.statistics().bytes == 0

    trio.run(main)


def test_a_view_of_a_large_buffer_costs_no_more_than_its_bytes(open_store: Open) -> None:
    buffer = bytearray(BLOB.content)

    async def test(store: BlockStore) -> None:
        piece = BLOB.pieces[1]
        view = memoryview(buffer)[BLOCK_SIZE : 2 * BLOCK_SIZE]
        assert await store.put(piece, view, BLOB.record(piece))
        assert store.statistics().bytes < BLOCK_SIZE + 2 * ENTRY_BYTES
        held = await store.get(piece)
        assert held is not None
        assert getattr(held.data, "obj", None) is not buffer
        assert await got(store, BLOB, piece)

    run(open_store, test)


def test_a_cancelled_call_leaves_the_store_whole(open_store: Open) -> None:
    async def test(store: BlockStore) -> None:
        await put(store, BLOB, BLOB.pieces[0])
        before = store.statistics()
        calls = (
            lambda: put(store, BLOB, BLOB.pieces[1]),
            lambda: store.get(BLOB.pieces[0]),
            lambda: store.discard(BLOB.pieces[0]),
        )
        for call in calls:
            with trio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught
            assert store.statistics() == before
        assert await got(store, BLOB, BLOB.pieces[0])
        assert await put(store, BLOB, BLOB.pieces[1])

    run(open_store, test)


def test_concurrent_puts_and_gets_keep_the_budget(open_store: Open) -> None:
    blobs = [Blob.random(seed, BLOCK_SIZE + 77) for seed in range(30, 36)]

    async def test(store: BlockStore) -> None:
        async def use(blob: Blob) -> None:
            for piece in blob.pieces * 3:
                await put(store, blob, piece)
                assert store.statistics().bytes <= BUDGET
                held = await store.get(piece)  # another task may have it evicted meanwhile
                assert held is None or bytes(held.data) == blob.bytes_of(piece)

        async with trio.open_nursery() as nursery:
            for blob in blobs * 2:
                nursery.start_soon(use, blob)
        assert store.statistics().entries >= 4

    run(open_store, test)


@pytest.fixture(params=["", "io.containerd.content.v1.content"])
def content(request, tmp_path: Path) -> ContentStore:
    folder = tmp_path / request.param / "blobs" / "sha256"
    folder.mkdir(parents=True)
    (folder / BLOB.digest.hex).write_bytes(BLOB.content)

    def record_for(ref: ObjectRef, index: int, sha: bytes) -> Record:
        return make_record(ref, index, sha, SIGNER, sign=lambda payload: bytes(64))

    return ContentStore(tmp_path, record_for=record_for)


def test_a_read_only_store(content: ContentStore) -> None:
    other = Blob.random(9, 100)

    async def main() -> None:
        assert content.holdings(BLOB.digest) == Holdings(0b1111)
        assert list(content.objects()) == [BLOB.digest]
        assert content.statistics().bytes == len(BLOB.content)
        for piece in BLOB.pieces:
            assert content.holds(piece)
            held = await content.get(piece)
            assert held is not None
            assert bytes(held.data) == BLOB.bytes_of(piece)
            assert held.record.matches(held.data)
            assert held.record.block == piece.block
        beyond = Piece(BLOB.pieces[0].block.__class__(BLOB.digest, 4))
        for piece in (BLOB.shard(0, DATA), beyond, other.pieces[0]):
            assert not content.holds(piece)
            assert await content.get(piece) is None
        assert not await put(content, other, other.pieces[0])
        await content.discard(BLOB.pieces[0])
        assert content.holds(BLOB.pieces[0])
        assert content.holdings(Digest("sha256", "0" * 64)) == Holdings()

    trio.run(main)
