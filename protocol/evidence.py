"""Evidence: that a member signed a false record, signed by the member who found it out.

The false record is the proof, and whoever has the true bytes can check it. The finder's signature says who answers for
the accusation where it is false. Bytes and rules: docs/PROTOCOL.md, "Evidence".
"""

from __future__ import annotations

from collections.abc import Callable

import msgpack
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from protocol.errors import BadInputError, PeerMisbehavedError
from protocol.ids import PeerId
from protocol.records import Record, check_record, public_key_of

_CONTEXT = b"shoal-evidence-1\x00"


class Evidence(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`record` is false, says `finder`. `source` is where its object is read, as in requests for blocks.

    `other`: a record of the same signer and block with another hash. One of the two is false, whoever looks.
    """

    record: Record
    source: str
    finder: PeerId
    signature: bytes
    other: Record | None = None

    @property
    def key(self) -> bytes:
        """A record is judged once, whoever tells of it."""
        return self.record.signature


def _payload(record: Record, source: str, finder: PeerId, other: Record | None) -> bytes:
    pair = [msgspec.structs.astuple(one) for one in (record, other) if one is not None]
    return _CONTEXT + bytes(msgpack.packb([pair, source, finder]))


def make_evidence(
    record: Record, source: str, finder: PeerId, sign: Callable[[bytes], bytes], other: Record | None = None
) -> Evidence:
    return Evidence(record, source, finder, sign(_payload(record, source, finder, other)), other)


def check_evidence(evidence: Evidence) -> None:
    """Raises PeerMisbehavedError unless every signature is right, and two records contradict each other.

    Whether the record is false, and who is a member, is the caller's question.
    """
    record, other, finder = evidence.record, evidence.other, evidence.finder
    try:
        for one in (record, other) if other is not None else (record,):
            check_record(one, one.object, one.index)
        key = Ed25519PublicKey.from_public_bytes(public_key_of(finder))
        key.verify(evidence.signature, _payload(record, evidence.source, finder, other))
    except (InvalidSignature, BadInputError) as error:
        raise PeerMisbehavedError(f"evidence that is not {finder}'s: {error}") from error
    if other is not None and not contradict(record, other):
        raise PeerMisbehavedError(f"two records by {record.signer} that do not contradict each other")


def contradict(one: Record, other: Record) -> bool:
    """Whether both are one signer's word on one block, and differ in its bytes."""
    first, second = ((each.signer, each.digest, each.index, each.size) for each in (one, other))
    return first == second and one.sha256 != other.sha256
