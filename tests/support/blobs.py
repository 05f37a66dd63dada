"""Objects for the tests of stores: bytes from a seed, their pieces and records."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, PeerId, Piece, Shard, shard_length
from protocol.records import Record, make_record
from protocol.shard_proofs import ShardProof, make_proof

SIGNER = PeerId("12D3KooWtest")


@dataclass(frozen=True)
class Blob:
    """Its records and proofs carry false signatures: the stores do not check them."""

    content: bytes

    @classmethod
    def random(cls, seed: int, size: int) -> Blob:
        return cls(random.Random(seed).randbytes(size))

    @cached_property
    def ref(self) -> ObjectRef:
        return ObjectRef(Digest("sha256", sha256(self.content).hexdigest()), len(self.content))

    @property
    def digest(self) -> Digest:
        return self.ref.digest

    @cached_property
    def pieces(self) -> list[Piece]:
        """The whole blocks."""
        return [Piece(self.ref.block(index)) for index in range(self.ref.block_count)]

    def shard(self, index: int, shard: Shard) -> Piece:
        return Piece(self.ref.block(index), shard)

    def bytes_of(self, piece: Piece) -> bytes:
        """Data shards are slices of the block; parity shards are its bytes in reverse."""
        start = piece.block.index * BLOCK_SIZE
        block = self.content[start : start + BLOCK_SIZE]
        if piece.shard is None:
            return block
        length = shard_length(len(block), piece.shard.k)
        if piece.shard.index >= piece.shard.k:
            return bytes(reversed(block))[:length]
        return block[piece.shard.index * length :][:length].ljust(length, b"\0")

    def record(self, piece: Piece) -> Record:
        index = piece.block.index
        sha = sha256(self.content[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]).digest()
        return make_record(self.ref, index, sha, SIGNER, sign=_signature)

    def proof(self, piece: Piece) -> ShardProof | None:
        if piece.shard is None:
            return None
        return make_proof(self.record(piece), piece.shard, self.bytes_of(piece), maker=SIGNER, sign=_signature)


def _signature(payload: bytes) -> bytes:
    return sha256(payload).digest() * 2
