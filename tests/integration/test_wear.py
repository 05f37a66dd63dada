"""What the disk store costs a flash memory: bytes written for each byte stored or served, as the kernel counts them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from cache.disk import DiskStore
from node.wear import written_bytes
from protocol.ids import BLOCK_SIZE, Shard
from tests.support.blobs import Blob
from tests.support.faulty_origin import FaultyOrigin
from tests.support.site import UPSTREAM, run, site

BLOB = Blob.random(1, 64 * BLOCK_SIZE)
SHARDS = [BLOB.shard(index, Shard(4, 1, index % 5)) for index in range(64)]
SMALL = [Blob.random(seed, 2000) for seed in range(2, 66)]
PAGE = 4096


async def bulk(store: DiskStore) -> int:
    for piece in BLOB.pieces:
        assert await store.put(piece, BLOB.bytes_of(piece), BLOB.record(piece))
    return len(BLOB.content)


async def trickle(store: DiskStore) -> int:
    """A shard a second: each with a flush of its own."""
    for piece in SHARDS:
        assert await store.put(piece, BLOB.bytes_of(piece), BLOB.record(piece))
        await store.flush()
    return len(SHARDS) * BLOCK_SIZE // 4


async def small(store: DiskStore) -> int:
    """Manifests; what is counted is their pages."""
    for blob in SMALL:
        assert await store.put(blob.pieces[0], blob.content, blob.record(blob.pieces[0]))
        await store.flush()
    return len(SMALL) * PAGE


@pytest.mark.parametrize(("work", "pages", "rows"), [(bulk, 1, 64), (trickle, 64, 64), (small, 64, 64)])
def test_each_byte_is_written_once(
    tmp_path: Path, work: Callable[[DiskStore], Awaitable[int]], pages: int, rows: int
) -> None:
    async def main() -> None:
        async with DiskStore.open(tmp_path, 1 << 30) as store:
            await store.flush()
            before = written_bytes()
            stored = await work(store)
            await store.flush(references=True)
        written = written_bytes() - before
        print(work.__name__, stored, written, written / stored, (written - stored) / rows)

    trio.run(main)
