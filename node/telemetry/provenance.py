"""Provenance: the source, time and retries of each block's last read, for `p2pctl why`, and totals by source."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from node.telemetry.sources import Source
from protocol.ids import Digest, PeerId

MAX_OBJECTS = 1024
MAX_BLOCKS = 1 << 16
"""Enough for 64 GiB of image data; 16 MB of memory if all are used. Beyond that the least recently read
objects are dropped, and of the last object the blocks that were read first."""


@dataclass(frozen=True, slots=True)
class Read:
    """The last read of one block for a client of this node. `at` is Unix time. `way`: as `Choice.text` of
    protocol/ways.py, "" if there was no choice."""

    source: Source
    seconds: float
    retries: int
    peers: tuple[PeerId, ...]
    at: float
    way: str = ""


class Provenance:
    def __init__(self) -> None:
        self._objects: OrderedDict[Digest, dict[int, Read]] = OrderedDict()
        self._blocks = 0
        self.bytes_served = dict.fromkeys(Source, 0)
        self.requests = dict.fromkeys(Source, 0)

    def note(self, digest: Digest, index: int, read: Read, served: int) -> None:
        """`served`: bytes of this block that were sent to a client."""
        self.bytes_served[read.source] += served
        self.requests[read.source] += 1
        reads = self._objects.setdefault(digest, {})
        self._objects.move_to_end(digest)
        self._blocks += index not in reads
        reads[index] = read
        self._forget(reads)

    def note_run(self, digest: Digest, blocks: range, read: Read, served: int) -> None:
        """Like `note` for blocks that follow each other, of which `served` bytes were sent together. Of a longer run
        than MAX_BLOCKS only the first blocks are noted each for itself."""
        self.bytes_served[read.source] += served
        self.requests[read.source] += len(blocks)
        reads = self._objects.setdefault(digest, {})
        self._objects.move_to_end(digest)
        before = len(reads)
        reads.update(dict.fromkeys(blocks[:MAX_BLOCKS], read))
        self._blocks += len(reads) - before
        self._forget(reads)

    def _forget(self, reads: dict[int, Read]) -> None:
        while len(self._objects) > MAX_OBJECTS or (self._blocks > MAX_BLOCKS and len(self._objects) > 1):
            self._blocks -= len(self._objects.popitem(last=False)[1])
        for index in list(islice(reads, max(0, self._blocks - MAX_BLOCKS))):
            del reads[index]
            self._blocks -= 1

    def reads(self, digest: Digest) -> Mapping[int, Read]:
        return self._objects.get(digest, {})
