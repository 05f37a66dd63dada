"""What an attacker says of members: its own statements, forged ones, members that do not exist, and suspicions."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from itertools import cycle

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.identity.certificates import Credentials, open_authority
from node.identity.identity import Identity
from protocol import messages as msg
from protocol.ids import PeerId
from protocol.introduction import VERSION
from protocol.member_table import KEY
from protocol.members import Member, News, Statement, Suspicion
from protocol.statements import Author
from protocol.summary import ROW
from protocol.wire import MAX_SUSPICIONS
from tests.support.adversary import Attacker, Line, prefixed
from tests.support.site import Node

LATEST = 1 << 53
A_MESSAGE = 64
"""Statements in one message: fewer than the wire allows."""


def author_of(attacker: Attacker) -> Author:
    return Author(attacker.peer, attacker.identity.sign, lambda: attacker.credentials.certificate)


def own_statement(
    attacker: Attacker,
    addresses: Sequence[str],
    rng: random.Random,
    *,
    weight: float | None = None,
    leaving: bool | None = None,
) -> Statement:
    """The attacker about itself, later than all that it said before."""
    weight = rng.choice((0.5, 1.0, 2.0)) if weight is None else weight
    leaving = rng.random() < 0.3 if leaving is None else leaving
    member = Member(attacker.peer, "liar", "loopback", (rng.choice(addresses),), weight)
    return author_of(attacker).state(member, time.time_ns() // 1_000_000, leaving=leaving)


def gathered(attacker: Attacker, node: Node, own: Statement) -> list[Statement]:
    """All statements that a node has, with their certificates: the answer to an empty summary."""
    reply = msgspec.convert(attacker.ask(node, sync(own))[1], tuple[Statement, ...])
    return [statement for statement in reply if statement.peer_id != attacker.peer]


def ping(
    statements: Sequence[Statement] = (), suspicions: Sequence[Suspicion] = (), *, doubted: bool = False
) -> msg.Ping:
    return msg.Ping(News(tuple(statements), tuple(suspicions), held=0, doubted=doubted))


def sync(own: Statement, summary: bytes = b"") -> msg.Sync:
    return msg.Sync(own, summary)


def full_summary(rows: int) -> bytes:
    """A view of members that do not exist, each of the latest incarnation."""
    return b"".join(ROW.pack(os.urandom(KEY), (1 << 64) - 1) for _ in range(rows))


def forged(attacker: Attacker, true: Statement, incarnation: int, *, leaving: bool) -> Iterator[Statement]:
    """Statements about a member that it did not make: each lies in another place."""
    changed = msgspec.structs.replace(
        Statement(**msgspec.structs.asdict(true)), incarnation=incarnation, leaving=leaving
    )
    mine = author_of(attacker).state(true.member, incarnation, leaving=leaving)
    yield changed
    yield msgspec.structs.replace(changed, certificate=b"")
    yield msgspec.structs.replace(changed, signature=mine.signature)
    yield mine
    yield msgspec.structs.replace(mine, seal=true.seal, certificate=true.certificate)
    yield msgspec.structs.replace(mine, certificate=true.certificate)
    moved = msgspec.structs.replace(true.member, addresses=("127.0.0.1:9",))
    yield msgspec.structs.replace(changed, member=moved)


def ghosts(attacker: Attacker, count: int, addresses: Sequence[str], *, fat: bool = False) -> list[Statement]:
    """Members that do not exist, of the largest weight: signed with keys of their own, with certificates that prove
    nothing."""
    long = tuple("x" * 200 + f":{port}" for port in range(7)) if fat else ()
    name = "n" * 255 if fat else "ghost"
    places, kinds = cycle(addresses), cycle(("none", "the attacker's", "of another cluster", "garbage"))
    made: list[Statement] = []
    for _ in range(count):
        ghost = Identity.of(Ed25519PrivateKey.generate())
        certificate = {
            "none": b"",
            "the attacker's": attacker.credentials.certificate,
            "of another cluster": b"",
            "garbage": b"\x30\x82\x01\x00" + bytes(256),
        }[kind := next(kinds)]
        if kind == "of another cluster":
            certificate = Credentials.issued(open_authority(), ghost, "ghost", "loopback").certificate
        author = Author(PeerId(ghost.peer_id), ghost.sign, lambda certificate=certificate: certificate)  # type: ignore[misc]
        member = Member(PeerId(ghost.peer_id), name, "loopback", (next(places), *long), 2.0)
        made.append(author.state(member, LATEST))
    return made


def messages_with(own: Statement, statements: Sequence[Statement]) -> Iterator[object]:
    """Messages that carry these statements, in each of the ways that the protocol has."""
    for begin in range(0, len(statements), A_MESSAGE):
        yield ping(statements[begin : begin + A_MESSAGE])
    for statement in statements[:4]:
        yield sync(statement)
    yield sync(own, full_summary(16_384))


def introduction(attacker: Attacker, own: Statement, others: Sequence[Statement]) -> list[bytes]:
    hello = prefixed([VERSION, attacker.credentials.certificate])
    return [hello, prefixed([own, *others])]


def suspicions(attacker: Attacker, statements: Sequence[Statement]) -> list[Suspicion]:
    """Of every member at its present incarnation, signed by the attacker, as many as a message may have."""
    me = author_of(attacker)
    return [me.suspect(statement.peer_id, statement.incarnation) for statement in statements][:MAX_SUSPICIONS]


def false_suspicions(attacker: Attacker, statements: Sequence[Statement]) -> list[Suspicion]:
    """Suspicions in the name of other members, and by members that do not exist."""
    me, ghost = author_of(attacker), Identity.of(Ed25519PrivateKey.generate())
    nobody = Author(PeerId(ghost.peer_id), ghost.sign, lambda: b"")
    named = [
        msgspec.structs.replace(me.suspect(statement.peer_id, statement.incarnation), accuser=accuser.peer_id)
        for statement in statements
        for accuser in statements
        if accuser is not statement
    ]
    return [*named, *(nobody.suspect(statement.peer_id, statement.incarnation) for statement in statements)]


def asked(line: Line, message: object) -> bool:
    """Whether the daemon answers, and not by Failed."""
    return bool(line.ask(message)[0] != 41)
