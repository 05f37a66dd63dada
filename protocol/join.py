"""The messages of a join: a node shows a token and receives its certificate. docs/PROTOCOL.md, "Joining".

The token goes only to a member that holds the authority's key: any other member could use it to admit nodes of its own.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from protocol.errors import PeerMisbehavedError
from protocol.ids import PeerId
from protocol.introduction import frame
from protocol.wire import MAX_NAME, decode, is_text

VERSION = 1
_CONTEXT = b"shoal-join-1\x00"
NONCE = 32
MAX_MESSAGE = 8192
"""A certificate of at most 4 KiB, a signature, and room for fields of later versions."""
MAX_REFUSAL = 500


class Knock(msgspec.Struct, frozen=True, array_like=True):
    version: int
    nonce: bytes


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """`authority` is the CA certificate (DER), `proof` a signature by its key; or `refusal` says why there is none."""

    version: int
    authority: bytes
    proof: bytes
    refusal: str = ""


class Application(msgspec.Struct, frozen=True, array_like=True):
    """`token` is the token's text, `name` the wanted name of the node."""

    token: str
    name: str


class Admittance(msgspec.Struct, frozen=True, array_like=True):
    """`certificate` is the node's (DER); or `refusal` says why there is none."""

    certificate: bytes
    refusal: str = ""


Message = TypeVar("Message", Knock, Offer, Application, Admittance)
_ENCODER = msgspec.msgpack.Encoder()


def proven(nonce: bytes, joiner: PeerId, member: PeerId) -> bytes:
    """Bytes that the authority's key signs for one connection: a replay with another nonce or peer proves nothing."""
    return _CONTEXT + _ENCODER.encode((nonce, joiner, member))


def encode(message: Knock | Offer | Application | Admittance) -> bytes:
    return frame(_ENCODER.encode(message))


def decode_as(kind: type[Message], body: bytes) -> Message:
    """Raises PeerMisbehavedError."""
    message = decode(msgspec.msgpack.Decoder(kind), body)
    if isinstance(message, Knock | Offer):
        _need(message.version == VERSION, f"version {message.version}")
    if isinstance(message, Knock):
        _need(len(message.nonce) == NONCE, "nonce")
    elif isinstance(message, Application):
        _need(is_text(message.name, MAX_NAME), "name")
    else:
        _need(is_text(message.refusal, MAX_REFUSAL), "refusal")
    return message


def _need(condition: bool, part: str) -> None:
    if not condition:
        raise PeerMisbehavedError(f"join: {part} is not understood")
