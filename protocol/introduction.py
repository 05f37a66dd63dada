"""The messages of an introduction: bytes to values and back, and all checks of the other side's messages.

Sequence and bytes: docs/PROTOCOL.md, "Introduction".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

from protocol.errors import BadInputError, PeerMisbehavedError
from protocol.ids import PeerId
from protocol.members import Statement
from protocol.records import public_key_of
from protocol.wire import check_statement, check_version, decode

VERSION = 2
PREFIX = struct.Struct(">I")
MAX_HELLO = 8192
"""A certificate of at most 4 KiB, and room for fields of later versions."""
MAX_MEMBERS_BYTES = 1 << 18
"""64 statements with certificates at some 650 bytes are 42 KB."""
MAX_INTRODUCED = 64
"""Members that one introduction may name. The first of them that answers names the others by a sync."""


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """The first message of each side. `certificate` is DER; members are named only once it is verified."""

    version: int
    certificate: bytes


_ENCODER = msgspec.msgpack.Encoder()
_HELLOS = msgspec.msgpack.Decoder(Hello)
_MEMBERS = msgspec.msgpack.Decoder(tuple[Statement, ...])


def encode_hello(certificate: bytes) -> bytes:
    return frame(_ENCODER.encode(Hello(VERSION, certificate)))


def encode_members(statements: Sequence[Statement]) -> bytes:
    """The sender's own first: as many as the bounds allow. All have their certificates."""
    statements = statements[:MAX_INTRODUCED]
    body = _ENCODER.encode(statements)
    while len(body) > MAX_MEMBERS_BYTES:
        statements = statements[: (len(statements) + 1) // 2]
        body = _ENCODER.encode(statements)
    return frame(body)


def body_length(prefix: bytes, most: int) -> int:
    """Bytes that follow a frame's prefix. Raises PeerMisbehavedError above `most`."""
    length: int = PREFIX.unpack(prefix)[0]
    if length > most:
        raise PeerMisbehavedError(f"message of {length} bytes in an introduction")
    return length


def decode_hello(body: bytes, peer: PeerId) -> bytes:
    """The certificate (DER, not verified yet) that `peer` shows. Raises PeerMisbehavedError."""
    hello = decode(_HELLOS, body)
    check_version("introduction", hello.version, VERSION, peer)
    return hello.certificate


def decode_members(body: bytes, peer: PeerId) -> tuple[Statement, ...]:
    """The statements that `peer` showed, its own first; none is verified. Raises PeerMisbehavedError."""
    statements = decode(_MEMBERS, body)
    if not 1 <= len(statements) <= MAX_INTRODUCED:
        raise PeerMisbehavedError(f"introduction that names {len(statements)} members")
    for statement in statements:
        _check(statement)
    if statements[0].peer_id != peer:
        raise PeerMisbehavedError(f"introduces itself as {statements[0].peer_id}, which it is not")
    return statements


def frame(body: bytes) -> bytes:
    return PREFIX.pack(len(body)) + body


def _check(statement: Statement) -> None:
    try:
        public_key_of(statement.peer_id)
    except BadInputError as error:
        raise PeerMisbehavedError(f"names a member by a false id: {error}") from error
    try:
        check_statement(statement)
    except BadInputError as error:
        raise PeerMisbehavedError(f"member {statement.peer_id}: {error}") from error
