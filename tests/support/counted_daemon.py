"""p2pd whose work is counted: `python -P FILE_OF_THIS --config FILE`, with all options of p2pd.

It counts the steps of its tasks, the tasks that it spawns, and the requests for blocks and shards that it sends, in a
file of 64-bit integers that another process may read at any time. The file is `counts` in the folder of the
configuration. A test starts a counted node with `node.program = COUNTED` before `launch`, and reads `counts_of(node)`.

It imports nothing else of tests/, because it also runs beside the code of other commits (tests/support/versions.py).
"""

from __future__ import annotations

import functools
import mmap
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

COUNTED = [sys.executable, "-P", __file__]
"""-P: the folder of this file is not a place of modules."""
FILE_NAME = "counts"
BLOCK_REQUESTS = frozenset({"GetShards", "GetShard", "GetBlock"})
STEPS, SPAWNS, REQUESTS = range(3)
_LAYOUT = struct.Struct("=3q")


@dataclass(frozen=True, slots=True)
class Counts:
    steps: int
    spawns: int
    requests: int

    def __sub__(self, earlier: Counts) -> Counts:
        return Counts(self.steps - earlier.steps, self.spawns - earlier.spawns, self.requests - earlier.requests)

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.steps + other.steps, self.spawns + other.spawns, self.requests + other.requests)


def counts_of(folder: Path) -> Counts:
    """The counts since the start of the node with this folder."""
    return Counts(*_LAYOUT.unpack((folder / FILE_NAME).read_bytes()))


class _Instrument(trio.abc.Instrument):
    def __init__(self, counts: memoryview) -> None:
        self._counts = counts

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._counts[STEPS] += 1

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self._counts[SPAWNS] += 1


def _counting(encode: Callable[..., bytes], counts: memoryview) -> Callable[..., bytes]:
    @functools.wraps(encode)
    def encode_head(request_id: int, message: object, *rest: Any, **options: Any) -> bytes:
        counts[REQUESTS] += type(message).__name__ in BLOCK_REQUESTS
        return encode(request_id, message, *rest, **options)

    return encode_head


def main() -> None:
    file = Path(sys.argv[sys.argv.index("--config") + 1]).with_name(FILE_NAME)
    file.write_bytes(bytes(_LAYOUT.size))
    with file.open("r+b") as opened:
        counts = memoryview(mmap.mmap(opened.fileno(), 0)).cast("q")
    from protocol import wire  # before the modules that use it are imported

    wire.encode_head = _counting(wire.encode_head, counts)
    trio.run = functools.partial(trio.run, instruments=[_Instrument(counts)])
    from node.daemon import main as p2pd

    p2pd()


if __name__ == "__main__":
    main()
