"""Members of the cluster, and what is said of them.

What is said of a member is a `Statement`, which that member signed: nobody speaks for another. A member that cannot
reach another may only say so, with a `Suspicion`, which it signs itself. protocol/statements.py has the signatures.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from protocol.ids import PeerId

MAX_ADDRESSES = 8
MAX_MEMBERS = 16384
"""Bound of a view: above the largest simulated site, far below the limits of memory."""
MIN_WEIGHT, MAX_WEIGHT = 0.5, 2.0
"""Weights other than 0 lie between: no member is home of more than four times the part of another."""


class Member(msgspec.Struct, frozen=True, array_like=True):
    """`addresses`: where its bulk channel listens (`host:port`, likeliest first). `weight`: its share of the shards."""

    peer_id: PeerId
    name: str
    site: str
    addresses: tuple[str, ...]
    weight: float = 1.0


class State(IntEnum):
    """In order of precedence at equal incarnation (SWIM, section 4.2). A member states only that it is alive or has
    left; SUSPECT and DEAD are conclusions that each node draws for itself."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


class Statement(msgspec.Struct, frozen=True, array_like=True):
    """What a member says of itself. A later incarnation overrides an earlier one. `seal` identifies its certificate;
    `certificate` (DER) is empty where the receiver has it."""

    member: Member
    incarnation: int
    leaving: bool
    seal: bytes
    signature: bytes
    certificate: bytes = b""

    @property
    def peer_id(self) -> PeerId:
        return self.member.peer_id

    @property
    def rank(self) -> tuple[int, bool, bytes]:
        """The order of the statements of one member. A member that signs two different statements of one incarnation
        gains nothing: any fixed choice makes all agree."""
        return self.incarnation, self.leaving, self.signature

    @property
    def state(self) -> State:
        return State.LEFT if self.leaving else State.ALIVE

    def bare(self) -> Statement:
        """The statement without its certificate, for a receiver that has it."""
        return Statement(self.member, self.incarnation, self.leaving, self.seal, signature=self.signature)


class Vouched(Statement, frozen=True, array_like=True):
    """A statement with its certificate, both checked: only these enter a table of members."""

    @classmethod
    def of(cls, statement: Statement, certificate: bytes) -> Vouched:
        return cls(
            statement.member,
            statement.incarnation,
            statement.leaving,
            statement.seal,
            signature=statement.signature,
            certificate=certificate,
        )


class Suspicion(msgspec.Struct, frozen=True, array_like=True):
    """`accuser` cannot reach `peer_id`, whose last statement it has is of this incarnation."""

    peer_id: PeerId
    incarnation: int
    accuser: PeerId
    signature: bytes


class News(msgspec.Struct, frozen=True, array_like=True):
    """What pings and their answers carry beside their purpose. `held`: the incarnation of the receiver that the sender
    has, 0 for none. `doubted`: the sender cannot reach the receiver, or could not; a statement of a later incarnation
    ends this."""

    statements: tuple[Statement, ...] = ()
    suspicions: tuple[Suspicion, ...] = ()
    held: int = 0
    doubted: bool = False


NO_NEWS = News()
