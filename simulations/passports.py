"""Certificates and signatures of simulated members: real ones, of the authority of `cluster.open`.

All nodes of a run check the same bytes in one process, so each check is done once. `Office.checks` counts those that
the nodes ask for: each costs a real node one signature, and a new member a certificate too.
"""

from __future__ import annotations

from functools import lru_cache

from node.identity.certificates import Subject, issue, issued_by, open_authority, subject_of
from node.identity.identity import Identity
from node.membership.passports import Passports
from protocol.members import Member, Statement
from protocol.statements import Author, check_statement

REMEMBERED = 1 << 16
"""Checks that are not repeated: several for each member of the largest run."""


class Office:
    """Gives passports to the members of one run."""

    def __init__(self) -> None:
        self.authority = open_authority()
        self.checks = 0
        self._check = lru_cache(REMEMBERED)(check_statement)
        self._subject_of = lru_cache(REMEMBERED)(self._read)

    def passports(self, identity: Identity, own: Member, serial: int) -> Passports:
        """Equal arguments give equal bytes, so that a run can be repeated."""
        certificate = issue(self.authority, Subject(identity.peer_id, own.name, own.site), serial=serial)
        author = Author(identity.peer_id, identity.sign, lambda: certificate)
        return Passports(author, self._subject_of, refusal=lambda certificate: "", is_signed=self._count)

    def _read(self, certificate: bytes) -> Subject:
        issued_by(certificate, self.authority.der)
        return subject_of(certificate)

    def _count(self, statement: Statement) -> None:
        self.checks += 1
        self._check(statement)
