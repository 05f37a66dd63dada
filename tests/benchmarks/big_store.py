"""A disk store of 1 TB of blocks: how long it takes to open, how much memory, and whether the loop ever waits.

`python -m tests.benchmarks.big_store [--blocks 2000000]` makes the rows of the index directly, and sparse files. Few of
their blocks have a page of data; holes are taken for data here, where a store would drop their rows. Then a process
opens the store, and puts, gets and evicts. The objects have lengths as layers do: many small, few large; `--mean` is
the number of blocks of an average one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

import msgspec
import trio

from cache.disk import DiskStore
from cache.disk_index import open_index
from cache.recovery import relative_path
from cache.runs import RUN_BLOCKS
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, PeerId, Piece
from protocol.records import Record
from tests.support.turns import LongTurn, Turns

SIGNER = PeerId("12D3KooWbenchmarkbenchmarkbenchmarkbenchmarkbenchma")
PAGE = 4096


def objects(blocks: int, mean: float, rng: random.Random) -> Iterator[tuple[Digest, int]]:
    """Digests and numbers of blocks, `blocks` in all: log-normal, so that a few objects have most of the bytes."""
    number = 0
    while blocks > 0:
        count = min(blocks, max(1, round(rng.lognormvariate(0, 1.2) * mean / 2.05)))
        yield Digest("sha256", sha256(f"object {number}".encode()).hexdigest()), count
        blocks, number = blocks - count, number + 1


def page(digest: Digest, index: int) -> bytes:
    """The beginning of a block with data. The rest of it is a hole."""
    return sha256(f"{digest} {index}".encode()).digest() * (PAGE // 32)


def make(folder: Path, blocks: int, mean: float, *, true_hashes: int) -> int:
    """Returns the number of objects. Each `true_hashes`th block has data."""
    folder.mkdir(parents=True)
    open_index(folder / "index.sqlite").close()
    database = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
    database.execute("PRAGMA synchronous = OFF")
    database.execute("BEGIN")
    made = done = 0
    for made, (digest, count) in enumerate(objects(blocks, mean, random.Random(1)), 1):
        path, size = folder / relative_path(digest, None), count * BLOCK_SIZE
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as file:
            os.ftruncate(file.fileno(), size)
        rows = []
        for index in range(count):
            done, sha = done + 1, bytes(32)
            if done % true_hashes == 0:
                begin = page(digest, index)
                sha = sha256(begin + bytes(BLOCK_SIZE - PAGE)).digest()
                with path.open("r+b", buffering=0) as file:
                    os.pwrite(file.fileno(), begin, index * BLOCK_SIZE)
            record = Record(str(digest), index, BLOCK_SIZE, size, sha256=sha, signer=SIGNER, signature=bytes(64))
            rows.append((str(digest), index, sha, msgspec.msgpack.encode(record)))
        database.executemany("INSERT INTO piece VALUES (?, ?, 0, 0, 0, ?, ?, NULL, NULL)", rows)
        for number in range(-(-count // RUN_BLOCKS)):
            bits = (1 << min(RUN_BLOCKS, count - number * RUN_BLOCKS)) - 1
            content = msgspec.msgpack.encode([(0, 0, 0, bits)])
            database.execute("INSERT INTO run VALUES (?, ?, ?, '', ?, ?)", (str(digest), size, number, made, content))
    database.execute("COMMIT")
    database.close()
    return made


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def measure(folder: Path, blocks: int, mean: float, true_hashes: int) -> dict[str, float]:
    right = [
        (ObjectRef(digest, count * BLOCK_SIZE), index)
        for done, (digest, count, index) in enumerate(
            ((d, c, i) for d, c in objects(blocks, mean, random.Random(1)) for i in range(c)), 1
        )
        if done % true_hashes == 0
    ]
    random.Random(2).shuffle(right)
    gc.collect()
    before, budget, figures = resident(), blocks * BLOCK_SIZE, dict[str, float]()
    turns = list[LongTurn]()
    trio.lowlevel.add_instrument(Turns(turns.append, 0.005))
    began = time.perf_counter()
    async with DiskStore.open(folder, budget) as store:
        figures["open_s"] = time.perf_counter() - began
        gc.freeze()  # as the daemon does
        figures["blocks"] = store.statistics().entries
        figures["bytes_a_block"] = (resident() - before) / blocks
        began = time.perf_counter()
        for ref, index in right[:200]:
            assert await store.get(Piece(ref.block(index))) is not None
        figures["get_ms"] = 1000 * (time.perf_counter() - began) / min(200, len(right))
        data, waited, puts = random.Random(3).randbytes(BLOCK_SIZE), 0, 2000
        began = time.perf_counter()
        for number in range(puts):
            digest = Digest("sha256", sha256(f"new {number // 100}".encode()).hexdigest())
            record = Record(
                str(digest), number % 100, BLOCK_SIZE, 100 * BLOCK_SIZE, sha256(data).digest(), SIGNER, bytes(64)
            )
            piece = Piece(record.block)
            await trio.lowlevel.checkpoint()
            if not store.put_nowait(piece, data, record):
                waited += 1
                assert await store.put(piece, data, record)
        figures["put_ms"] = 1000 * (time.perf_counter() - began) / puts
        figures["puts_that_waited"] = waited
        figures["held_bytes"], figures["budget_bytes"] = store.statistics().bytes, budget
        began = time.perf_counter()
        await store.flush()
        figures["flush_s"] = time.perf_counter() - began
        await store.compared.wait()
        figures["compared_s"] = time.perf_counter() - began
        figures["bytes_a_block_at_the_end"] = (resident() - before) / blocks
        store.resize(budget - (1 << 30))
        began = time.perf_counter()
        while store.statistics().bytes > budget - (1 << 30):
            await store.flush()
            await trio.sleep(0.1)
        figures["evict_1_gib_s"] = time.perf_counter() - began
    for turn in sorted(turns, key=lambda turn: turn.cpu_s)[-5:]:
        print(turn)
    figures["longest_turn_ms"] = 1000 * max((turn.cpu_s for turn in turns), default=0)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=2_000_000)
    parser.add_argument("--mean", type=float, default=40)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/shoal-big-store"))
    parser.add_argument("--keep", action="store_true", help="Use a folder that is there, and leave it.")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    true_hashes = max(1, options.blocks // 1000)
    if options.measure:
        with patch("cache.recovery._data_end", lambda fd, offset: 1 << 62):
            print(json.dumps(trio.run(measure, options.folder, options.blocks, options.mean, true_hashes), indent=2))
        return
    if not (options.keep and options.folder.exists()):
        began = time.perf_counter()
        count = make(options.folder, options.blocks, options.mean, true_hashes=true_hashes)
        print(f"{count} objects made in {time.perf_counter() - began:.0f} s")
    subprocess.run([sys.executable, "-m", "tests.benchmarks.big_store", *sys.argv[1:], "--measure"], check=True)
    if not options.keep:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
