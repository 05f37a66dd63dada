"""Provenance: the source, time and retries of each block's last read, for `p2pctl why`, and totals by source."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from node.telemetry.sources import Source
from protocol.ids import Digest, PeerId

MAX_OBJECTS = 1024
MAX_BLOCKS = 1 << 16
"""Enough for 32 GiB of image data; 11 MB of memory if all are used. Beyond that the least recently read
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


_SOURCES = tuple(Source)
_HEAD = struct.Struct("<BHdd")
_MAX_PEERS = 1 << 16
"""Different members that reads may name: as many as a number of two bytes stands for."""


class Provenance:
    """Reads are kept packed, in a quarter of the memory of their objects."""

    def __init__(self) -> None:
        self._objects: OrderedDict[Digest, dict[int, bytes]] = OrderedDict()
        self._numbers: dict[PeerId, int] = {}
        self._peers: list[PeerId] = []
        self._blocks = 0
        self.bytes_served = dict.fromkeys(Source, 0)
        self.requests = dict.fromkeys(Source, 0)

    def note(self, digest: Digest, index: int, read: Read, served: int) -> None:
        """`served`: bytes of this block that were sent to a client."""
        self.bytes_served[read.source] += served
        self.requests[read.source] += 1
        packed = self._packed(read)
        reads = self._objects.setdefault(digest, {})
        self._objects.move_to_end(digest)
        self._blocks += index not in reads
        reads[index] = packed
        self._forget(reads)

    def note_run(self, digest: Digest, blocks: range, read: Read, served: int) -> None:
        """Like `note` for blocks that follow each other, of which `served` bytes were sent together. Of a longer run
        than MAX_BLOCKS only the first blocks are noted each for itself."""
        self.bytes_served[read.source] += served
        self.requests[read.source] += len(blocks)
        packed = self._packed(read)
        reads = self._objects.setdefault(digest, {})
        self._objects.move_to_end(digest)
        before = len(reads)
        reads.update(dict.fromkeys(blocks[:MAX_BLOCKS], packed))
        self._blocks += len(reads) - before
        self._forget(reads)

    def _forget(self, reads: dict[int, bytes]) -> None:
        while len(self._objects) > MAX_OBJECTS or (self._blocks > MAX_BLOCKS and len(self._objects) > 1):
            self._blocks -= len(self._objects.popitem(last=False)[1])
        for index in list(islice(reads, max(0, self._blocks - MAX_BLOCKS))):
            del reads[index]
            self._blocks -= 1

    def reads(self, digest: Digest) -> Mapping[int, Read]:
        return {index: self._unpacked(packed) for index, packed in self._objects.get(digest, {}).items()}

    def _packed(self, read: Read) -> bytes:
        head = _HEAD.pack(_SOURCES.index(read.source), min(read.retries, 0xFFFF), read.seconds, read.at)
        numbers = [self._number(peer) for peer in read.peers]
        return head + struct.pack(f"<{len(numbers)}H", *numbers)

    def _number(self, peer: PeerId) -> int:
        number = self._numbers.get(peer)
        if number is None:
            if len(self._peers) == _MAX_PEERS:  # in years of changing members: begin anew
                self._objects.clear()
                self._blocks = 0
                self._numbers.clear()
                self._peers.clear()
            number = self._numbers[peer] = len(self._peers)
            self._peers.append(peer)
        return number

    def _unpacked(self, packed: bytes) -> Read:
        source, retries, seconds, at = _HEAD.unpack_from(packed)
        numbers = struct.unpack_from(f"<{(len(packed) - _HEAD.size) // 2}H", packed, _HEAD.size)
        return Read(_SOURCES[source], seconds, retries, tuple(self._peers[number] for number in numbers), at)
