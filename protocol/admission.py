"""Join tokens and revocations, which the cluster's authority signs, as it signs certificates.

This module has their values, bytes and checks. It reads no clock: `now` is an argument. Bytes: docs/FORMATS.md, "Join
tokens" and "Revocations". Use: docs/PROTOCOL.md, "Joining" and "Revocation".
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from typing import TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from protocol.errors import UNDECODABLE, BadInputError, NotAdmittedError
from protocol.ids import PeerId
from protocol.records import public_key_of

Sign = Callable[[bytes], bytes]
"""Ed25519 with the authority's key."""

TOKEN_PREFIX, _TOKEN_CONTEXT = "shoal-join-1.", b"shoal-token-1\x00"  # names of formats, not secrets
REVOCATION_PREFIX, _REVOCATION_CONTEXT = "shoal-revocation-1.", b"shoal-revocation-1\x00"
_TOKEN_SUBJECT = "token:"  # not a secret

SIGNATURE = 64
ID_BYTES = 16
MAX_TEXT = 1024
"""Characters of a token or a revocation; real ones have some 210."""
MAX_SITE = 64
MAX_USES = 1024
"""Nodes that a token with a limit may admit: the peer id of each is kept."""
MAX_TIME = 1 << 40
"""Unix seconds: beyond any date, and far enough from the limit of 64-bit integers for any sum."""
MIN_LIFETIME_S = 24 * 3600
"""With a shorter lifetime, a certificate could expire before its renewal if a clock is wrong by hours."""
MAX_SUBJECT = 64
"""Characters: a peer id has 52, a token's subject 38."""
MAX_REVOCATIONS = 1024
"""All of them travel in every sync of whole views: 150 KiB. A cluster that loses more nodes needs a new key."""


class Token(msgspec.Struct, frozen=True, array_like=True):
    """An invitation. `cluster` is the SHA-256 of the CA certificate; `made` and `expires` are Unix time; `uses`: how
    many nodes it admits, 0 for any number; `lifetime`: seconds for which its certificates are valid, 0 for ever."""

    cluster: bytes
    site: str
    made: int
    expires: int
    uses: int
    lifetime: int
    id: bytes

    @property
    def subject(self) -> str:
        """The name under which it is revoked. Not a secret: it does not admit a node."""
        return _TOKEN_SUBJECT + self.id.hex()


class Revocation(msgspec.Struct, frozen=True, array_like=True):
    """The authority's statement that a peer id, or a join token's `subject`, is refused permanently."""

    subject: str
    made: int
    signature: bytes


_ENCODER = msgspec.msgpack.Encoder()
_Value = TypeVar("_Value")


def cluster_id(authority: bytes) -> bytes:
    """Identifies a cluster: the SHA-256 of its CA certificate (DER)."""
    return sha256(authority).digest()


def make_token(token: Token, sign: Sign) -> str:
    """The text of a token. Raises BadInputError for values out of bounds."""
    _check_token(token)
    body = _ENCODER.encode(token)
    return _to_text(TOKEN_PREFIX, body + sign(_TOKEN_CONTEXT + body))


def read_token(text: str) -> Token:
    """A token's values, not verified: its bearer cannot check them before it has the CA certificate. Raises
    BadInputError. No error contains a part of the text, which is a secret."""
    return _token_of(_from_text(TOKEN_PREFIX, text, "join token"))


def check_token(text: str, authority: Ed25519PublicKey, cluster: bytes, now: float) -> Token:
    """A token that this authority signed and that has not expired at `now` (Unix time). Raises NotAdmittedError with
    the reason. The caller counts its uses."""
    try:
        data = _from_text(TOKEN_PREFIX, text, "join token")
        token = _token_of(data)
    except BadInputError as error:
        raise NotAdmittedError(str(error)) from error
    if token.cluster != cluster or not _is_signed(authority, data[-SIGNATURE:], _TOKEN_CONTEXT + data[:-SIGNATURE]):
        raise NotAdmittedError("the join token is of another cluster, or altered")
    if now > token.expires:
        raise NotAdmittedError(
            f"the join token expired at {date(token.expires)}; it is {date(now)} at the member that issues certificates"
        )
    return token


def _token_of(data: bytes) -> Token:
    token = _decoded(Token, data[:-SIGNATURE], "join token")
    _check_token(token)
    return token


def _check_token(token: Token) -> None:
    good = (
        len(token.cluster) == 32
        and is_site(token.site)
        and 0 <= token.made < token.expires <= MAX_TIME
        and 0 <= token.uses <= MAX_USES
        and (token.lifetime == 0 or MIN_LIFETIME_S <= token.lifetime <= MAX_TIME)
        and len(token.id) == ID_BYTES
    )
    if not good:
        raise BadInputError("the join token's values are out of bounds")


def is_site(text: str) -> bool:
    """Whether `text` can be the site in a token and a certificate."""
    return 1 <= len(text) <= MAX_SITE and text.isprintable()


def make_revocation(cluster: bytes, subject: str, now: int, sign: Sign) -> Revocation:
    """Raises BadInputError if `subject` is neither a peer id nor a token's subject."""
    _check_subject(subject)
    return Revocation(subject, now, sign(_revoked(cluster, subject, now)))


def revocation_text(revocation: Revocation) -> str:
    return _to_text(REVOCATION_PREFIX, _ENCODER.encode(revocation))


def read_revocation(text: str) -> Revocation:
    """A revocation's values, not verified. Raises BadInputError."""
    return _decoded(Revocation, _from_text(REVOCATION_PREFIX, text, "revocation"), "revocation")


def check_revocation(revocation: Revocation, authority: Ed25519PublicKey, cluster: bytes) -> None:
    """Raises BadInputError unless this authority signed it."""
    _check_subject(revocation.subject)
    if not 0 <= revocation.made <= MAX_TIME or len(revocation.signature) != SIGNATURE:
        raise BadInputError("the revocation's values are out of bounds")
    signed = _revoked(cluster, revocation.subject, revocation.made)
    if not _is_signed(authority, revocation.signature, signed):
        raise BadInputError(f"the revocation of {revocation.subject} is not signed by this cluster's authority")


def _revoked(cluster: bytes, subject: str, made: int) -> bytes:
    return _REVOCATION_CONTEXT + _ENCODER.encode((cluster, subject, made))


def _check_subject(subject: str) -> None:
    if subject.startswith(_TOKEN_SUBJECT):
        digits = subject.removeprefix(_TOKEN_SUBJECT)
        if len(digits) != 2 * ID_BYTES or set(digits) - set("0123456789abcdef"):
            raise BadInputError(f"not the name of a join token: {subject[:80]!r}")
    else:
        public_key_of(PeerId(subject))


def date(seconds: float) -> str:
    """Text for people: `2026-11-24 16:38 UTC`."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.0f} s after 1970"


def _is_signed(authority: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        authority.verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def _to_text(prefix: str, data: bytes) -> str:
    return prefix + base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _from_text(prefix: str, text: str, kind: str) -> bytes:
    """Accepts only the output of `_to_text`: one value has one text."""
    coded = text.removeprefix(prefix)
    try:
        data = base64.b64decode(coded + "=" * (-len(coded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(text) > MAX_TEXT or len(data) <= SIGNATURE or _to_text(prefix, data) != text:
        raise BadInputError(f"not a {kind}: copy the whole text, which begins with {prefix}")
    return data


def _decoded(value: type[_Value], data: bytes, kind: str) -> _Value:
    try:
        return msgspec.msgpack.decode(data, type=value)
    except UNDECODABLE as error:
        raise BadInputError(f"the {kind} cannot be decoded") from error
