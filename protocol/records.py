"""Block records: a node's signed claim about the bytes of one block.

OCI digests cover only whole objects. A record binds one block to its sha256 and is signed with the Ed25519 key of the
node that read the block from the registry, so that a false block shows which member vouched for it. Bytes:
docs/FORMATS.md, "Record".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256

import base58
import msgpack
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from protocol.errors import BadInputError, PeerMisbehavedError
from protocol.ids import BlockId, Buffer, Digest, ObjectRef, PeerId

_CONTEXT = b"shoal-record-2\x00"
_KEYS = 1024
"""Keys that stay decoded: base58 takes 18 us, the check of a signature 100."""
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
"""Identity multihash of a libp2p protobuf public key: Ed25519, 32 bytes."""


def peer_id_of(public_key: bytes) -> PeerId:
    """The libp2p peer id of a raw 32-byte Ed25519 public key (libp2p specs, peer-ids)."""
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + public_key).decode("ascii"))


def public_key_of(peer: PeerId) -> bytes:
    """The raw Ed25519 key in a peer id. Raises BadInputError if there is none."""
    if len(peer) > 64 or not peer.isalnum():  # b58decode accepts spaces, and a key must not have two names
        raise BadInputError(f"not an Ed25519 peer id: {peer[:80]!r}")
    try:
        raw = base58.b58decode(peer)
    except ValueError as error:
        raise BadInputError(f"not an Ed25519 peer id: {peer!r}") from error
    if len(raw) != 38 or not raw.startswith(_PEER_ID_PREFIX):
        raise BadInputError(f"not an Ed25519 peer id: {peer!r}")
    return raw[6:]


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`sha256` is that of the whole block's `length` bytes; `size` is the object's."""

    digest: str
    index: int
    length: int
    size: int
    sha256: bytes
    signer: PeerId
    signature: bytes

    @property
    def object(self) -> ObjectRef:
        return ObjectRef(Digest.parse(self.digest), self.size)

    @property
    def block(self) -> BlockId:
        return self.object.block(self.index)

    def matches(self, data: Buffer) -> bool:
        """Whether `data` is the whole block that this record is about."""
        return len(data) == self.length and sha256(data).digest() == self.sha256

    @property
    def payload(self) -> bytes:
        """The signed bytes."""
        return _CONTEXT + bytes(msgpack.packb(msgspec.structs.astuple(self)[:-1]))


@lru_cache(_KEYS)
def _verifier(peer: PeerId) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(public_key_of(peer))


def verify(signer: PeerId, signature: bytes, payload: bytes) -> None:
    """Raises BadInputError unless `signature` is `signer`'s."""
    try:
        _verifier(signer).verify(signature, payload)
    except InvalidSignature as error:
        raise BadInputError("wrong signature") from error


def make_record(ref: ObjectRef, index: int, sha: bytes, signer: PeerId, sign: Callable[[bytes], bytes]) -> Record:
    """Sign block `index` of `ref`, whose bytes hash to `sha`. `sign` is Ed25519 with the signer's key."""
    length, digest = ref.block_length(index), str(ref.digest)
    unsigned = Record(digest, index, length, ref.size, sha256=sha, signer=signer, signature=b"")
    return msgspec.structs.replace(unsigned, signature=sign(unsigned.payload))


def check_record(record: Record, ref: ObjectRef, index: int) -> None:
    """Raises PeerMisbehavedError unless the record is about this block and its signature is the signer's. The caller
    checks whether the signer is a member."""
    expected = (str(ref.digest), index, ref.block_length(index), ref.size)
    if (record.digest, record.index, record.length, record.size) != expected or len(record.sha256) != 32:
        raise PeerMisbehavedError(f"record of another block than {ref.digest} #{index}")
    try:
        verify(record.signer, record.signature, record.payload)
    except BadInputError as error:
        raise PeerMisbehavedError(f"signature on {ref.digest} #{index} is not {record.signer}'s") from error
