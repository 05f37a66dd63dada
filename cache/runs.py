"""What a disk store holds, in little memory: bitmaps of runs.

A *run* is a range of RUN_BLOCKS consecutive blocks of one object: the whole blocks and the shards of this range that
are kept for the same members, or are used here, or pinned. It has one place in the order of eviction. The records of
its pieces are in the index only. Pieces of another object under the same digest, one of another size, are in a run of
their own: the size decides the lengths of pieces.
"""

from __future__ import annotations

from collections.abc import Iterator

from cache.pieces import set_bits
from cache.store import Askers, Holdings
from protocol.ids import BLOCK_SIZE, BlockId, Digest, Piece, Shard, shard_length

RUN_BLOCKS = 64
"""32 MiB. A run takes about 1 KiB of memory with its place in the order of eviction, as a single piece would."""
PAGE = 4096
"""Space is taken and given back in multiples of this: the file system's block."""


def space(length: int) -> int:
    """Bytes of disk that `length` bytes take."""
    return -(-length // PAGE) * PAGE


def slot_of(shard: Shard | None) -> int:
    """Bytes from one block to the next in a file: slots start on a page, so that giving one back keeps the others."""
    return BLOCK_SIZE if shard is None else space(shard_length(BLOCK_SIZE, shard.k))


def piece_length(size: int, index: int, shard: Shard | None) -> int:
    """The length of a piece of an object of `size` bytes."""
    length = min(BLOCK_SIZE, size - index * BLOCK_SIZE)
    return length if shard is None else shard_length(length, shard.k)


class Run:
    """`used` orders runs by their last reference, in Unix milliseconds. Runs of the same range have the same hash."""

    __slots__ = ("_hash", "blocks", "digest", "kept_for", "number", "shards", "size", "used")

    def __init__(self, digest: Digest, size: int, number: int, kept_for: Askers) -> None:
        self.digest, self.size, self.number, self.kept_for = digest, size, number, kept_for
        self.blocks = 0
        self.shards: dict[Shard, int] | None = None
        self.used = 0
        self._hash = hash((digest, number))

    def __hash__(self) -> int:
        return self._hash

    def bits(self, shard: Shard | None) -> int:
        """The held pieces: bit i for the range's block i."""
        if shard is None:
            return self.blocks
        return self.shards.get(shard, 0) if self.shards is not None else 0

    def set(self, shard: Shard | None, bits: int) -> None:
        if shard is None:
            self.blocks = bits
        elif bits:
            self.shards = {**(self.shards or {}), shard: bits}
        elif self.shards is not None:
            self.shards = {other: held for other, held in self.shards.items() if other != shard} or None

    def content(self) -> dict[Shard | None, int]:
        """The bits, by shard; those of whole blocks under None."""
        held: dict[Shard | None, int] = {None: self.blocks} if self.blocks else {}
        for shard, bits in (self.shards or {}).items():
            held[shard] = bits
        return held

    @property
    def is_empty(self) -> bool:
        return not self.blocks and self.shards is None

    def piece(self, bit: int, shard: Shard | None) -> Piece:
        return Piece(BlockId(self.digest, self.number * RUN_BLOCKS + bit), shard)

    def pieces(self) -> list[Piece]:
        return [self.piece(bit, shard) for shard, bits in self.content().items() for bit in set_bits(bits)]

    def space(self, shard: Shard | None, bits: int) -> int:
        """Bytes of disk that some pieces of the run take."""
        last = (self.size - 1) // BLOCK_SIZE
        taken = bits.bit_count() * slot_of(shard)
        if last // RUN_BLOCKS == self.number and bits >> last % RUN_BLOCKS & 1:
            taken += space(piece_length(self.size, last, shard)) - slot_of(shard)
        return taken


class Runs:
    """The runs of all objects that a store holds pieces of."""

    def __init__(self) -> None:
        self._objects: dict[Digest, dict[int, tuple[Run, ...]]] = {}
        self.pieces = 0
        """The number of pieces held."""

    def find(self, piece: Piece) -> Run | None:
        """The run that holds the piece."""
        ranges = self._objects.get(piece.block.digest)
        if ranges is None:
            return None
        number, bit = divmod(piece.block.index, RUN_BLOCKS)
        for run in ranges.get(number, ()):
            if run.bits(piece.shard) >> bit & 1:
                return run
        return None

    def at(self, digest: Digest, number: int) -> tuple[Run, ...]:
        """The runs of a range."""
        return self._objects.get(digest, {}).get(number, ())

    def in_range(self, digest: Digest, number: int, shard: Shard | None) -> int:
        """The bits of all runs of a range."""
        bits = 0
        for run in self.at(digest, number):
            bits |= run.bits(shard)
        return bits

    def run(self, digest: Digest, size: int, number: int, kept_for: Askers) -> Run:
        """The run of this kind, which is made if there is none."""
        ranges = self._objects.setdefault(digest, {})
        for run in ranges.get(number, ()):
            if run.size == size and run.kept_for == kept_for:
                return run
        digest = next((runs[0].digest for runs in ranges.values()), digest)  # one object in memory for all runs
        run = Run(digest, size, number, kept_for)
        ranges[number] = (*ranges.get(number, ()), run)
        return run

    def add(self, run: Run, shard: Shard | None, bits: int) -> None:
        """Hold pieces that no run holds."""
        run.set(shard, run.bits(shard) | bits)
        self.pieces += bits.bit_count()

    def remove(self, run: Run, shard: Shard | None, bits: int) -> None:
        run.set(shard, run.bits(shard) & ~bits)
        self.pieces -= bits.bit_count()
        if run.is_empty:
            ranges = self._objects[run.digest]
            ranges[run.number] = tuple(other for other in ranges[run.number] if other is not run)
            if not ranges[run.number]:
                del ranges[run.number]
            if not ranges:
                del self._objects[run.digest]

    def of(self, digest: Digest) -> list[Run]:
        """The runs of an object, in the order of its blocks."""
        ranges = self._objects.get(digest, {})
        return [run for number in sorted(ranges) for run in ranges[number]]

    def __iter__(self) -> Iterator[Run]:
        return (run for ranges in self._objects.values() for runs in ranges.values() for run in runs)

    def holds_any(self, digest: Digest, shard: Shard | None) -> bool:
        """Whether a piece of this kind is held."""
        ranges = self._objects.get(digest, {})
        return any(run.bits(shard) for runs in ranges.values() for run in runs)

    def bitmap(self, digest: Digest, shard: Shard | None = None) -> int:
        return _joined((run.number, run.bits(shard)) for run in self.of(digest))

    def holdings(self, digest: Digest) -> Holdings:
        runs = self.of(digest)
        shards = {shard for run in runs for shard in run.shards or ()}
        bitmaps = {shard: _joined((run.number, run.bits(shard)) for run in runs) for shard in shards}
        return Holdings(_joined((run.number, run.blocks) for run in runs), bitmaps)

    def shards_of(self, block: BlockId) -> list[Piece]:
        number, bit = divmod(block.index, RUN_BLOCKS)
        return [
            Piece(block, shard)
            for run in self.at(block.digest, number)
            for shard, bits in (run.shards or {}).items()
            if bits >> bit & 1
        ]

    def objects(self) -> list[Digest]:
        """Those that came last are first."""
        return list(reversed(self._objects))


def _joined(parts: Iterator[tuple[int, int]]) -> int:
    """The bitmap of an object from those of its ranges, in linear time, which shifts would not be."""
    joined = bytearray()
    for number, bits in parts:
        start, width = number * RUN_BLOCKS // 8, RUN_BLOCKS // 8
        joined.extend(bytes(max(0, start + width - len(joined))))
        old = int.from_bytes(joined[start : start + width], "little")
        joined[start : start + width] = (old | bits).to_bytes(width, "little")
    return int.from_bytes(joined, "little")
