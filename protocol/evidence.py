"""Evidence that a member signed a false record, signed by the member that discovered it.

The false record is the proof, and any member that has the true bytes can check it. The finder's signature shows which
member is responsible for a false accusation. Bytes and rules: docs/PROTOCOL.md, "Evidence".
"""

from __future__ import annotations

from collections.abc import Callable

import msgpack
import msgspec

from protocol.errors import BadInputError, PeerMisbehavedError
from protocol.ids import PeerId
from protocol.records import Record, check_record, verify

_CONTEXT = b"shoal-evidence-1\x00"


class Evidence(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`finder` states that `record` is false. `source` is where its object is read, as in requests for blocks. `other`:
    a record of the same signer and block with another hash, so that one of the two is certainly false."""

    record: Record
    source: str
    finder: PeerId
    signature: bytes
    other: Record | None = None


def _payload(record: Record, source: str, finder: PeerId, other: Record | None) -> bytes:
    pair = [msgspec.structs.astuple(part) for part in (record, other) if part is not None]
    return _CONTEXT + bytes(msgpack.packb([pair, source, finder]))


def make_evidence(
    record: Record, source: str, finder: PeerId, sign: Callable[[bytes], bytes], other: Record | None = None
) -> Evidence:
    return Evidence(record, source, finder, signature=sign(_payload(record, source, finder, other)), other=other)


def check_evidence(evidence: Evidence) -> None:
    """Raises PeerMisbehavedError unless every signature is right, and two records contradict each other. The caller
    checks whether the record is false, and whether signer and finder are members."""
    record, other, finder = evidence.record, evidence.other, evidence.finder
    try:
        for part in (record, other) if other is not None else (record,):
            check_record(part, part.object, part.index)
        verify(finder, evidence.signature, _payload(record, evidence.source, finder, other))
    except BadInputError as error:
        raise PeerMisbehavedError(f"evidence that is not {finder}'s: {error}") from error
    if other is not None and not contradict(record, other):
        raise PeerMisbehavedError(f"two records by {record.signer} that do not contradict each other")


def contradict(first: Record, second: Record) -> bool:
    """Whether one signer signed both for one block, with different bytes."""
    keys = [(record.signer, record.digest, record.index, record.size) for record in (first, second)]
    return keys[0] == keys[1] and first.sha256 != second.sha256
