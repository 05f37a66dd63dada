"""The messages of an introduction: bytes to values and back, and all checks of the other side's messages.

Sequence and bytes: docs/PROTOCOL.md, "Introduction".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

from protocol.errors import BadInputError, PeerMisbehavedError
from protocol.ids import PeerId
from protocol.members import Member
from protocol.records import public_key_of
from protocol.wire import check_member, decode

VERSION = 1
PREFIX = struct.Struct(">I")
MAX_HELLO = 8192
"""A certificate of at most 4 KiB, and room for fields of later versions."""
MAX_MEMBERS_BYTES = 1 << 20
"""1024 members at some 200 bytes are 0.2 MB."""
MAX_INTRODUCED = 1024
"""Members that one introduction may name: one site and its neighbours, well under a message's bound."""


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """The first message of each side. `certificate` is DER; members are named only once it is verified."""

    version: int
    certificate: bytes


_ENCODER = msgspec.msgpack.Encoder()
_HELLOS = msgspec.msgpack.Decoder(Hello)
_MEMBERS = msgspec.msgpack.Decoder(tuple[Member, ...])


def encode_hello(certificate: bytes) -> bytes:
    return frame(_ENCODER.encode(Hello(VERSION, certificate)))


def encode_members(me: Member, members: Sequence[Member]) -> bytes:
    """The sender first, then the others of `members`: as many as the bounds allow."""
    others = [member for member in members if member.peer_id != me.peer_id][: MAX_INTRODUCED - 1]
    body = _ENCODER.encode((me, *others))
    while len(body) > MAX_MEMBERS_BYTES:
        others = others[: len(others) // 2]
        body = _ENCODER.encode((me, *others))
    return frame(body)


def body_length(prefix: bytes, most: int) -> int:
    """Bytes that follow a frame's prefix. Raises PeerMisbehavedError above `most`."""
    length: int = PREFIX.unpack(prefix)[0]
    if length > most:
        raise PeerMisbehavedError(f"message of {length} bytes in an introduction")
    return length


def decode_hello(body: bytes) -> bytes:
    """The certificate (DER, not verified yet). Raises PeerMisbehavedError."""
    hello = decode(_HELLOS, body)
    if hello.version != VERSION:
        raise PeerMisbehavedError(f"speaks version {hello.version} of the introduction, not {VERSION}")
    return hello.certificate


def decode_members(body: bytes, peer: PeerId) -> tuple[Member, ...]:
    """The members that `peer` named, itself first. Raises PeerMisbehavedError."""
    members = decode(_MEMBERS, body)
    if not 1 <= len(members) <= MAX_INTRODUCED:
        raise PeerMisbehavedError(f"introduction that names {len(members)} members")
    for member in members:
        _check(member)
    if members[0].peer_id != peer:
        raise PeerMisbehavedError(f"introduces itself as {members[0].peer_id}, which it is not")
    return members


def frame(body: bytes) -> bytes:
    return PREFIX.pack(len(body)) + body


def _check(member: Member) -> None:
    try:
        public_key_of(member.peer_id)
    except BadInputError as error:
        raise PeerMisbehavedError(f"names a member by a false id: {error}") from error
    try:
        check_member(member)
    except BadInputError as error:
        raise PeerMisbehavedError(f"member {member.peer_id}: {error}") from error
