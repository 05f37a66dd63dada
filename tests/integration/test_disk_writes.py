"""The wear of flash memory: bytes written, as the kernel counts them. The bounds are those of docs/OPERATIONS.md."""

from __future__ import annotations

import http.client
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest
import trio

from cache.disk import DiskStore
from node.runtime.disk_writes import written_bytes
from protocol.ids import BLOCK_SIZE, Piece, Shard
from tests.support.blobs import Blob
from tests.support.faulty_origin import FaultyOrigin, content
from tests.support.site import UPSTREAM, site

PAGE = 4096
ONCE = 24 * PAGE
"""Bytes of the index for opening and closing the store."""
PER_FLUSH = 5 * PAGE
PER_PIECE = 1024
BLOB = Blob.random(1, 32 * BLOCK_SIZE)
SMALL = [Blob.random(seed, 2000) for seed in range(2, 202)]


async def put(store: DiskStore, blob: Blob, piece: Piece) -> None:
    assert await store.put(piece, blob.bytes_of(piece), blob.record(piece))


async def in_bulk(store: DiskStore) -> tuple[int, int]:
    for piece in BLOB.pieces:
        await put(store, BLOB, piece)
    return len(BLOB.content), 1


async def one_by_one(store: DiskStore) -> tuple[int, int]:
    """Shards that arrive slowly, so that each causes a flush of its own."""
    shards = [BLOB.shard(index, Shard(4, 1, index % 5)) for index in range(32)]
    for piece in shards:
        await put(store, BLOB, piece)
        await store.flush()
    return len(shards) * BLOCK_SIZE // 4, len(shards)


async def manifests(store: DiskStore) -> tuple[int, int]:
    for blob in SMALL:
        await put(store, blob, blob.pieces[0])
        await store.flush()
    return len(SMALL) * PAGE, len(SMALL)


async def reads(store: DiskStore) -> tuple[int, int]:
    """Reads write nothing before the store is closed."""
    for piece in BLOB.pieces * 10:
        assert await store.get(piece)
    await store.flush()
    return 0, 1


@pytest.mark.parametrize("work", [in_bulk, one_by_one, manifests, reads])
def test_each_byte_is_written_once(tmp_path: Path, work: Callable[[DiskStore], Awaitable[tuple[int, int]]]) -> None:
    """The data is written once, and some pages of the index for each flush."""

    async def main() -> None:
        if work is reads:
            async with DiskStore.open(tmp_path, 1 << 30) as store:
                await in_bulk(store)
        before = written_bytes()
        async with DiskStore.open(tmp_path, 1 << 30) as store:
            data, flushes = await work(store)
            pieces = store.statistics().entries
        index = written_bytes() - before - data
        print(
            f"{work.__name__}: {data} bytes of data; index {index}, {index / flushes:.0f} for each of {flushes} flushes"
        )
        assert index <= ONCE + flushes * PER_FLUSH + pieces * PER_PIECE

    trio.run(main)


def test_a_node_shows_the_bytes_that_it_wrote(folder: Path) -> None:
    size = 24 * BLOCK_SIZE + 12345
    with FaultyOrigin(size) as origin, site(folder / "site", origin.url, 1) as (node,):
        for _ in range(4):
            with closing(http.client.HTTPConnection(node.host, node.mirror_port, timeout=60)) as connection:
                connection.request("GET", f"/v2/app/blobs/{origin.digest}?ns={UPSTREAM}")
                assert connection.getresponse().read() == content(0, size)
        wear = node.status()["wear"]
        assert wear["served_bytes"] == 4 * size
        assert wear["written_bytes"] <= 1.02 * size + (1 << 20)
        assert wear["written_bytes"] >= size or file_system(node.data) in ("tmpfs", "overlay")
        for command in ("status", "cache"):
            assert "for each byte served" in node.ctl(command).stdout


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    return max((where, kind) for where, kind in mounts if path.is_relative_to(where))[1]
