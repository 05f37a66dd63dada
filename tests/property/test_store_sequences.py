"""Random sequences of operations on a store: no wrong byte, and never more than the budget."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import patch

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.disk import DiskStore
from cache.memory import MemoryStore
from cache.store import BlockStore, Holdings
from protocol.ids import BLOCK_SIZE, Piece, Shard
from tests.support.blobs import Blob

BUDGET = 600_000
BLOBS = [Blob.random(1, 150_000), Blob.random(2, 60_000), Blob.random(3, BLOCK_SIZE + 100_000), Blob.random(4, 1)]
SHARDS = [Shard(4, 1, 0), Shard(4, 1, 4), Shard(2, 1, 1)]
BLOB_OF = {blob.digest: blob for blob in BLOBS}
PIECES = [
    Piece(piece.block, shard)
    for blob in BLOBS
    for piece in blob.pieces
    for shard in (None, *SHARDS)
    if shard or len(blob.bytes_of(piece)) < BUDGET
]
RECORDS = {piece: BLOB_OF[piece.block.digest].record(piece) for piece in PIECES}
BYTES = {piece: BLOB_OF[piece.block.digest].bytes_of(piece) for piece in PIECES}

steps = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "get", "discard", "drop", "flush", "reopen"]), st.sampled_from(PIECES)
    ),
    max_size=40,
)


def expected_holdings(store: BlockStore, blob: Blob) -> Holdings:
    bits = {
        shard: sum(
            1 << p.block.index for p in PIECES if p.block.digest == blob.digest and p.shard == shard and store.holds(p)
        )
        for shard in (None, *SHARDS)
    }
    return Holdings(bits[None], {shard: n for shard, n in bits.items() if shard is not None and n})


async def step(store: BlockStore, action: str, piece: Piece) -> None:
    held_before = store.holds(piece)
    if action == "put":
        assert await store.put(piece, BYTES[piece], RECORDS[piece]) <= store.holds(piece)
    elif action == "discard":
        await store.discard(piece)
        assert not store.holds(piece)
    elif action == "get":
        held = await store.get(piece)
        assert (held is not None) == held_before
        assert held is None or (bytes(held.data), held.record) == (BYTES[piece], RECORDS[piece])
    elif isinstance(store, DiskStore) and action == "drop":
        await store.drop_object(piece.block.digest)
        assert store.holdings(piece.block.digest) == Holdings()
    elif isinstance(store, DiskStore) and action == "flush":
        await store.flush()


def check(store: BlockStore) -> None:
    statistics = store.statistics()
    held = [piece for piece in PIECES if store.holds(piece)]
    assert statistics.entries == len(held)
    assert sum(len(BYTES[piece]) for piece in held) <= statistics.bytes <= statistics.budget_bytes == BUDGET
    assert set(store.objects()) == {piece.block.digest for piece in held}
    for blob in BLOBS:
        assert store.holdings(blob.digest) == expected_holdings(store, blob)


async def carry_out(opened, actions: list[tuple[str, Piece]]) -> None:
    """The action `reopen` ends a run. The other actions continue with the pieces that the store still has."""
    position = 0
    while position < len(actions):
        async with opened() as store:
            for action, piece in actions[position:]:
                position += 1
                if action == "reopen":
                    break
                await step(store, action, piece)
                check(store)
            before = {piece for piece in PIECES if store.holds(piece)}
        async with opened() as store:
            check(store)
            assert isinstance(store, MemoryStore) or before == {piece for piece in PIECES if store.holds(piece)}
            for piece in PIECES:
                await step(store, "get", piece)


@given(actions=steps)
@settings(max_examples=60)
def test_memory(actions: list[tuple[str, Piece]]) -> None:
    @asynccontextmanager
    async def opened() -> AsyncIterator[MemoryStore]:
        yield MemoryStore(BUDGET, trio.current_time)

    trio.run(carry_out, opened, actions)


def run_on_disk(actions: list[tuple[str, Piece]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trio.run(carry_out, lambda: DiskStore.open(Path(folder), BUDGET), actions)
        allocated = sum(path.stat().st_blocks * 512 for path in Path(folder, "objects").rglob("*") if path.is_file())
        assert allocated <= BUDGET


@given(actions=steps)
@settings(max_examples=40)
def test_disk(actions: list[tuple[str, Piece]]) -> None:
    run_on_disk(actions)


@given(actions=steps)
@settings(max_examples=20)
def test_disk_that_cannot_punch_holes(actions: list[tuple[str, Piece]]) -> None:
    with patch("cache.recovery.can_punch", lambda directory: False):
        run_on_disk(actions)
