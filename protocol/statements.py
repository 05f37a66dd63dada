"""Signatures of membership: statements of members about themselves, suspicions, and proofs that a member is alive.

Each signature is Ed25519 with the key in the signer's peer id, over a context that names the kind, and msgpack. The
certificate that comes with a statement is checked by node/membership/passports.py. Bytes: docs/PROTOCOL.md,
"Membership".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

import msgspec

from protocol.ids import PeerId
from protocol.members import Member, Statement, Suspicion, Vouched
from protocol.records import verify

SEAL = 16
"""Bytes of a certificate's SHA-256 that a statement names."""
NONCE = 16
"""Bytes that an asker draws for a proof, so that no earlier proof will do."""
_STATEMENT, _SUSPICION, _ALIVE = b"shoal-member-1\x00", b"shoal-suspicion-1\x00", b"shoal-alive-1\x00"
_ENCODER = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class Author:
    """Signs for one member. `sign` is Ed25519 with its key; `certificate` returns its current certificate (DER)."""

    peer_id: PeerId
    sign: Callable[[bytes], bytes]
    certificate: Callable[[], bytes]

    def state(self, member: Member, incarnation: int, *, leaving: bool = False) -> Vouched:
        certificate = self.certificate()
        unsigned = Vouched(member, incarnation, leaving, seal_of(certificate), signature=b"", certificate=certificate)
        return msgspec.structs.replace(unsigned, signature=self.sign(_stated(unsigned)))

    def suspect(self, peer: PeerId, incarnation: int) -> Suspicion:
        return Suspicion(peer, incarnation, self.peer_id, self.sign(_suspected(peer, incarnation, self.peer_id)))

    def prove(self, nonce: bytes) -> bytes:
        """The proof that this member was alive after `nonce` was drawn."""
        return self.sign(_ALIVE + nonce)


def seal_of(certificate: bytes) -> bytes:
    return sha256(certificate).digest()[:SEAL]


def check_statement(statement: Statement) -> None:
    """Raises BadInputError unless the member itself signed it."""
    verify(statement.peer_id, statement.signature, _stated(statement))


def check_suspicion(suspicion: Suspicion) -> None:
    """Raises BadInputError unless the accuser signed it."""
    signed = _suspected(suspicion.peer_id, suspicion.incarnation, suspicion.accuser)
    verify(suspicion.accuser, suspicion.signature, signed)


def check_alive(peer: PeerId, nonce: bytes, proof: bytes) -> None:
    """Raises BadInputError unless `proof` is that of `peer` for `nonce`."""
    verify(peer, proof, _ALIVE + nonce)


def _stated(statement: Statement) -> bytes:
    fields = msgspec.structs.astuple(statement.member)
    return _STATEMENT + _ENCODER.encode((*fields, statement.incarnation, statement.leaving, statement.seal))


def _suspected(peer: PeerId, incarnation: int, accuser: PeerId) -> bytes:
    return _SUSPICION + _ENCODER.encode((peer, incarnation, accuser))
