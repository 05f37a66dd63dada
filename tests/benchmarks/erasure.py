"""Speed of the erasure code and of reedsolo's loop on a core, in MB/s of blocks: `python -m tests.benchmarks.erasure`.

Each figure is a median. The cases run in turns, so that other load on the machine slows all of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import reedsolo
from rich.console import Console
from rich.table import Table

from protocol.erasure import decode_block, encode_shard
from protocol.ids import BLOCK_SIZE

ROUNDS = 15
REPEATS = 8
ORACLE_BYTES = 16384
"""Bytes for reedsolo's slow loop, so that all cases take seconds."""

GEOMETRIES = ((3, 1), (4, 1), (4, 2))

Case = tuple[str, str, int, Callable[[], object]]


def encode_all(block: bytes, k: int, m: int) -> list[memoryview]:
    return [encode_shard(block, k, m, index) for index in range(k, k + m)]


def shoal_cases(block: bytes, k: int, m: int) -> list[Case]:
    code = f"{k}+{m}"
    shards = {i: encode_shard(block, k, m, i) for i in range(k + m)}
    out = bytearray(len(block))
    cases: list[Case] = [
        (code, "encode one parity shard", len(block), lambda: encode_shard(block, k, m, k + m - 1)),
        (code, "encode all parity shards", len(block), lambda: encode_all(block, k, m)),
    ]
    for losses in range(m + 1):
        kept = {i: shards[i] for i in range(losses, k + losses)}
        work = partial(decode_block, kept, k, m, length=len(block), out=out)
        cases.append((code, f"decode, {losses} lost", len(block), work))
    return cases


def reedsolo_cases(block: bytes, k: int, m: int) -> list[Case]:
    codec = reedsolo.RSCodec(m, nsize=k + m, fcr=0)
    data = block[: ORACLE_BYTES // k * k]
    coded = codec.encode(data)
    lost = [at for at in range(len(coded)) if at % (k + m) < m]
    return [
        (f"{k}+{m}", "reedsolo: encode", len(data), lambda: codec.encode(data)),
        (
            f"{k}+{m}",
            f"reedsolo: decode, {m} lost",
            len(data),
            lambda: codec.decode(coded, erase_pos=lost, only_erasures=True),
        ),
    ]


def seconds(work: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    block = random.Random(1).randbytes(BLOCK_SIZE)
    fast = [case for k, m in GEOMETRIES for case in shoal_cases(block, k, m)]
    slow = [case for k, m in GEOMETRIES for case in reedsolo_cases(block, k, m)]
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(ROUNDS):
        for code, case, _, work in fast:
            times.setdefault((code, case), []).append(seconds(work, REPEATS))
        if turn % 5 == 0:
            for code, case, _, work in slow:
                times.setdefault((code, case), []).append(seconds(work, 1))
    table = Table(title=f"Erasure code, blocks of {BLOCK_SIZE >> 10} KiB, one core")
    for heading in ("code", "work", "MB/s of block"):
        table.add_column(heading, justify="right" if heading.startswith("MB") else "left")
    for code, case, size, _ in sorted(fast + slow, key=lambda row: row[0]):
        table.add_row(code, case, f"{size / median(times[code, case]) / 1e6:,.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
