"""Programs that write to a folder for tests of power cuts: `python -m tests.support.power_loss_work NAME FOLDER`.

Marks in the trace name the pieces that must exist from then on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from cache.disk import DiskStore
from cache.disk_index import PRAGMAS
from protocol.ids import BLOCK_SIZE, Digest, Piece, Shard
from tests.support.blobs import Blob
from tests.support.file_trace import say
from tests.support.remembered import Remembered

BUDGET = 1_000_000
KEPT = Blob.random(0, 9000)
LONG = Blob.random(1, BLOCK_SIZE + 40_000)
OTHERS = [Blob.random(seed, 60_000 + seed) for seed in range(2, 8)]
SHARDS = [LONG.shard(block, Shard(4, 1, number)) for block, number in ((0, 0), (1, 0), (1, 4))]
PIECES = [*KEPT.pieces, *SHARDS, *LONG.pieces, *(piece for blob in OTHERS for piece in blob.pieces)]
PINNED = frozenset([KEPT.digest])
_BLOBS: dict[Digest, Blob] = {blob.digest: blob for blob in (KEPT, LONG, *OTHERS)}
_CHECKPOINT = 5
"""Pages of SQLite's log after which it makes a checkpoint. The default of 1000 is more than these programs write."""


def blob_of(piece: Piece) -> Blob:
    return _BLOBS[piece.block.digest]


async def put(store: DiskStore, *pieces: Piece) -> None:
    for piece in pieces:
        assert await store.put(piece, blob_of(piece).bytes_of(piece), blob_of(piece).record(piece))


async def first(store: DiskStore) -> None:
    await put(store, *KEPT.pieces, *SHARDS)
    await store.flush()
    await put(store, *OTHERS[0].pieces, *OTHERS[1].pieces)
    await store.flush()
    assert await store.get(KEPT.pieces[0])


async def removals(store: DiskStore) -> None:
    """Removals of all kinds. The process then kills itself."""
    await put(store, LONG.pieces[1])  # replaces its shards, one of which is in the middle of a file
    await store.flush()
    await put(store, LONG.pieces[0])
    await store.discard(OTHERS[0].pieces[0])
    await store.flush()
    await store.discard(LONG.pieces[0])
    await store.flush()
    await put(store, *OTHERS[0].pieces, *LONG.pieces)
    await store.flush()
    for blob in OTHERS[2:]:  # others are evicted
        await put(store, *blob.pieces)
        await store.flush()
    await put(store, *OTHERS[0].pieces, *OTHERS[1].pieces)
    os.kill(os.getpid(), signal.SIGKILL)


async def after_the_kill(store: DiskStore) -> None:
    for piece in PIECES:
        await store.get(piece)
    await put(store, *OTHERS[1].pieces)
    await store.drop_object(OTHERS[2].digest)


def _live(folder: Path, budget: int, life: Callable[[DiskStore], Awaitable[None]]) -> None:
    PRAGMAS.append(f"wal_autocheckpoint = {_CHECKPOINT}")

    async def main() -> None:
        async with DiskStore.open(folder, budget, pinned=PINNED) as store:
            await life(store)
            held = [number for number, piece in enumerate(PIECES) if store.holds(piece)]
        say("kept", held)

    trio.run(main)


def store(folder: Path) -> None:
    """Lives of a store, each in a process of its own: cold, full, killed, repaired, and with less room."""
    for budget, life in (BUDGET, first), (BUDGET, removals), (BUDGET, after_the_kill), (BUDGET // 2, DiskStore.flush):
        if life is not first:
            say("kept", [0])  # the pinned piece; other pieces may disappear from now on
        process = multiprocessing.get_context("fork").Process(target=_live, args=(folder, budget, life))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if life is removals else 0)


def data(folder: Path) -> None:
    """The state files of a daemon's data folder, in two processes one after the other."""
    folder.mkdir()
    for life in range(2):
        trio.run(Remembered(folder).work, life)


if __name__ == "__main__":
    {"store": store, "data": data}[sys.argv[1]](Path(sys.argv[2]))
