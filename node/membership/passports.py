"""Who may be spoken of: a member's statement counts only with the member's signature and certificate.

The certificate proves that the cluster's authority admitted the member, so that nobody can invent members. Both are
checked once, when a statement would change the table of members; the table then holds them. docs/PROTOCOL.md,
"Membership".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio

from node.identity.certificates import Subject
from protocol.errors import BadInputError, PeerMisbehavedError
from protocol.members import Statement, Suspicion, Vouched
from protocol.statements import Author, check_statement, check_suspicion, seal_of

CHECKS_IN_A_TURN = 8
"""Statements that are checked in one turn of the event loop: some 4 ms with certificates, on a slow board 20 ms."""


@dataclass(frozen=True, slots=True)
class Passports:
    """`author` signs for this node. `subject_of` returns the subject of a certificate (DER) that this cluster's
    authority issued, or raises PeerMisbehavedError. `refusal` returns why a certificate that it issued does not count
    here and now (revoked, expired), or "". `is_signed` raises BadInputError unless the member signed the statement."""

    author: Author
    subject_of: Callable[[bytes], Subject]
    refusal: Callable[[bytes], str]
    is_signed: Callable[[Statement], None] = check_statement

    def check(self, statement: Statement, held: Vouched | None) -> Vouched | None:
        """`held`: the statement of that member in the table. None if this node cannot judge: the certificate was left
        out and is not here, or it does not count here and now, which the sender may see differently.

        Raises PeerMisbehavedError for a statement that no honest member passes on.
        """
        if held is not None and held.bare() == statement.bare():
            return held
        is_held = held is not None and held.seal == statement.seal
        certificate = held.certificate if held is not None and is_held else statement.certificate
        if not certificate:
            return None
        peer = statement.peer_id
        if seal_of(certificate) != statement.seal:
            raise PeerMisbehavedError(f"sent a statement of {peer} with another certificate than it names")
        try:
            self.is_signed(statement)
        except BadInputError as error:
            raise PeerMisbehavedError(f"sent a statement that {peer} did not sign") from error
        if not is_held:
            self._check_subject(statement, certificate)
            if self.refusal(certificate):
                return None
        return Vouched.of(statement, certificate)

    def _check_subject(self, statement: Statement, certificate: bytes) -> None:
        subject, member = self.subject_of(certificate), statement.member
        if subject.peer != member.peer_id or subject.site not in ("", member.site):
            raise PeerMisbehavedError(f"sent a statement that the certificate of {member.peer_id} does not cover")

    async def check_all(self, statements: Iterable[Statement]) -> list[Vouched]:
        """Those that pass `check`, none being in the table. Raises PeerMisbehavedError if one of them misbehaves."""
        vouched = []
        for count, statement in enumerate(statements):
            if count and not count % CHECKS_IN_A_TURN:
                await trio.lowlevel.checkpoint()
            checked = self.check(statement, None)
            if checked is not None:
                vouched.append(checked)
        return vouched

    def check_suspicion(self, suspicion: Suspicion) -> None:
        """Raises PeerMisbehavedError unless its accuser signed it."""
        try:
            check_suspicion(suspicion)
        except BadInputError as error:
            raise PeerMisbehavedError(f"sent a suspicion that {suspicion.accuser} did not sign") from error
