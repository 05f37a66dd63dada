"""The messages of a join: a node without a certificate shows a token and gets one. docs/PROTOCOL.md, "Joining".

The token goes only to a member that holds the authority's key: any other could use it to admit nodes of its own.
"""

from __future__ import annotations

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


Message = Knock | Offer | Application | Admittance

_ENCODER = msgspec.msgpack.Encoder()
_KNOCKS = msgspec.msgpack.Decoder(Knock)
_OFFERS = msgspec.msgpack.Decoder(Offer)
_APPLICATIONS = msgspec.msgpack.Decoder(Application)
_ADMITTANCES = msgspec.msgpack.Decoder(Admittance)


def proven(nonce: bytes, joiner: PeerId, member: PeerId) -> bytes:
    """Bytes that the authority's key signs for one connection: a replay with another nonce or peer proves nothing."""
    return _CONTEXT + _ENCODER.encode((nonce, joiner, member))


def encode(message: Message) -> bytes:
    return frame(_ENCODER.encode(message))


def decode_knock(body: bytes) -> Knock:
    """Raises PeerMisbehavedError, as do the functions below."""
    knock = decode(_KNOCKS, body)
    _need(knock.version == VERSION, f"version {knock.version}")
    _need(len(knock.nonce) == NONCE, "nonce")
    return knock


def decode_offer(body: bytes) -> Offer:
    offer = decode(_OFFERS, body)
    _need(offer.version == VERSION, f"version {offer.version}")
    _need(is_text(offer.refusal, MAX_REFUSAL), "refusal")
    return offer


def decode_application(body: bytes) -> Application:
    application = decode(_APPLICATIONS, body)
    _need(is_text(application.name, MAX_NAME), "name")
    return application


def decode_admittance(body: bytes) -> Admittance:
    admittance = decode(_ADMITTANCES, body)
    _need(is_text(admittance.refusal, MAX_REFUSAL), "refusal")
    return admittance


def _need(condition: bool, part: str) -> None:
    if not condition:
        raise PeerMisbehavedError(f"join: {part} is not understood")
