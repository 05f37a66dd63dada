"""Identifiers, and the arithmetic of blocks.

An *object* is immutable bytes named by their digest. It is cut into *blocks* of `BLOCK_SIZE` bytes; the last may be
shorter. A block is coded into k+m *shards* of equal size: shards 0..k-1 are its slices, the others parity. A *piece* is
what a store holds: a whole block or one shard of it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import NamedTuple, NewType

from protocol.errors import BadInputError

BLOCK_SIZE = 1 << 19
"""docs/decisions/0005-blocks-of-512-kib.md gives the costs of other sizes."""
MAX_OBJECT_SIZE = 1 << 40
"""1 TiB: larger sizes from outside are refused before any allocation."""

Buffer = bytes | bytearray | memoryview

PeerId = NewType("PeerId", str)
"""A libp2p peer id of an Ed25519 key in base58 text (`12D3Koo...`)."""

_HEX_LENGTHS = {"sha256": 64, "sha512": 128}
_HEX = re.compile(r"[0-9a-f]+", re.ASCII)


class Digest(NamedTuple):
    """A content digest as in the OCI image specification: `sha256:` or `sha512:` and lower-case hex."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Raises BadInputError unless `text` is exactly a supported digest."""
        algorithm, _, hexadecimal = text.partition(":")
        if len(hexadecimal) != _HEX_LENGTHS.get(algorithm) or not _HEX.fullmatch(hexadecimal):
            raise BadInputError(f"not a sha256 or sha512 digest: {text[:160]!r}")
        return cls(algorithm, hexadecimal)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """An object and its size in bytes, which determines its blocks."""

    digest: Digest
    size: int

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_OBJECT_SIZE:
            raise BadInputError(f"size of {self.digest} out of range: {self.size}")

    @property
    def block_count(self) -> int:
        return -(-self.size // BLOCK_SIZE)

    def block(self, index: int) -> BlockId:
        if not 0 <= index < self.block_count:
            raise BadInputError(f"{self.digest} has {self.block_count} blocks, not a block {index}")
        return BlockId(self.digest, index)

    def block_length(self, index: int) -> int:
        return min(BLOCK_SIZE, self.size - index * BLOCK_SIZE)


def is_possible(digest: Digest, size: int, most: int) -> bool:
    """Whether an object may have this size by what is known before its bytes: only the digest of nothing has none."""
    is_empty = hashlib.new(digest.algorithm).hexdigest() == digest.hex
    return size == 0 if is_empty else 0 < size <= most


class BlockId(NamedTuple):
    digest: Digest
    index: int  # type: ignore[assignment] # tuple has a method of this name


class Shard(NamedTuple):
    """Shard `index` of the code with k data and m parity shards."""

    k: int
    m: int
    index: int  # type: ignore[assignment] # as in BlockId


class Piece(NamedTuple):
    """A whole block (`shard` is None) or one shard of it."""

    block: BlockId
    shard: Shard | None = None


def shard_length(block_length: int, k: int) -> int:
    """Bytes in each shard of a block; the last data shard is padded with zeros to this length."""
    return -(-block_length // k)
