"""Members of the cluster, as introductions and membership gossip describe them."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from protocol.ids import PeerId

MAX_ADDRESSES = 8
MAX_MEMBERS = 16384
"""Bound of a view: above the largest simulated site, far below the limits of memory."""


class Member(msgspec.Struct, frozen=True, array_like=True):
    """`addresses`: where its bulk channel listens (`host:port`, likeliest first). `weight`: its share of the shards."""

    peer_id: PeerId
    name: str
    site: str
    addresses: tuple[str, ...]
    weight: float = 1.0


class State(IntEnum):
    """In order of precedence at equal incarnation (SWIM, section 4.2)."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


class Update(msgspec.Struct, frozen=True, array_like=True):
    """A statement about a member, as gossip carries it. A later incarnation overrides an earlier one."""

    member: Member
    state: State
    incarnation: int
