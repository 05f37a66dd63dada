"""Proofs of shards: their maker's signature, so that a wrong shard shows which member made it.

A record binds the bytes of a whole block, and says nothing about one shard of it. So the member that cuts a shard for a
keeper signs the shard's sha256 under the record. Whoever knows the block's bytes can compute the shard again: if the
signed sha256 is another, its maker is convicted by arithmetic, regardless of who asked, placement or time. The keeper
checks the signature before it keeps the shard. Bytes: docs/FORMATS.md, "Proof of a shard".
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

import msgpack
import msgspec

from protocol.errors import BadInputError, PeerMisbehavedError
from protocol.ids import Buffer, PeerId, Shard
from protocol.records import Record, verify

_CONTEXT = b"shoal-shard-1\x00"


class ShardProof(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`maker` states that the shard's bytes hash to `sha256`."""

    maker: PeerId
    sha256: bytes
    signature: bytes


def _payload(record: Record, shard: Shard, sha: bytes) -> bytes:
    block = [record.digest, record.index, record.size, record.sha256]
    return _CONTEXT + bytes(msgpack.packb([*block, shard.k, shard.m, shard.index, sha]))


def make_proof(
    record: Record, shard: Shard, data: Buffer, *, maker: PeerId, sign: Callable[[bytes], bytes]
) -> ShardProof:
    """Sign a shard of the record's block. `sign` is Ed25519 with the maker's key."""
    sha = sha256(data).digest()
    return ShardProof(maker, sha, sign(_payload(record, shard, sha)))


def check_proof(proof: ShardProof, record: Record, shard: Shard, data: Buffer) -> None:
    """Raises PeerMisbehavedError unless the maker signed exactly these bytes. The caller checks whether the maker is a
    member; whether the bytes are a shard of the block shows only once the block is known."""
    if sha256(data).digest() != proof.sha256:
        raise PeerMisbehavedError(f"shard {shard.index} of {record.digest} #{record.index} has other bytes than signed")
    try:
        verify(proof.maker, proof.signature, _payload(record, shard, proof.sha256))
    except BadInputError as error:
        text = f"signature on shard {shard.index} of {record.digest} #{record.index} is not {proof.maker}'s"
        raise PeerMisbehavedError(text) from error


def answerable_for(sender: PeerId, proof: ShardProof | None, record: Record, shard: Shard, data: Buffer) -> PeerId:
    """The member to blame for a shard whose bytes are wrong: the maker, if it signed them; else the sender, which
    made the shard itself or passed it on without the check of its signature."""
    if proof is None:
        return sender
    try:
        check_proof(proof, record, shard, data)
    except PeerMisbehavedError:
        return sender
    return proof.maker
