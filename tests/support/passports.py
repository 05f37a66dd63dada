"""Passports of members in tests: real signatures, and certificates of the authority of `cluster.open`."""

from __future__ import annotations

from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.identity.identity import Identity
from node.membership.passports import Passports
from protocol.members import Member, Vouched
from simulations.passports import Office

OFFICE = Office()
AUTHORITY = OFFICE.authority


def identity_of(name: str) -> Identity:
    """Always the same for the same name."""
    return Identity.of(Ed25519PrivateKey.from_private_bytes(sha256(name.encode()).digest()))


def passports_of(own: Member, identity: Identity | None = None, serial: int = 1) -> Passports:
    """`identity` None: the member does not sign as itself, in tests where no other member checks it."""
    return OFFICE.passports(identity or identity_of(own.name), own, serial)


def stated(own: Member, identity: Identity, incarnation: int = 1, *, leaving: bool = False) -> Vouched:
    return passports_of(own, identity).author.state(own, incarnation, leaving=leaving)
