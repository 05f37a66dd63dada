"""Frames of the bulk channel: bytes to messages and back. The bytes are specified in docs/PROTOCOL.md, "Bulk channel".

A frame is a prefix (u32 header length, u32 body length, both big-endian), a msgpack header `[request id, message]`, and
a raw body. Nothing here does I/O: `Heads` is fed the bytes that arrived and gives heads. It leaves the body to the
caller, which knows its length from the head and can let the socket write it into its final buffer.

All checks of a peer's messages are in this file; a message that fails one raises PeerMisbehavedError.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec

from protocol import messages as msg
from protocol.admission import MAX_REVOCATIONS, MAX_SUBJECT, Revocation
from protocol.errors import UNDECODABLE, BadInputError, PeerMisbehavedError
from protocol.ids import BLOCK_SIZE, MAX_OBJECT_SIZE, Buffer, Digest, ObjectRef, shard_length
from protocol.members import MAX_ADDRESSES, MAX_MEMBERS, Member, Update
from protocol.records import Record

PREFIX = struct.Struct(">II")
MAGIC = b"shoal-bulk"
VERSION = 2
MAX_HEADER = 4 << 20
"""The largest message is a whole view: 16384 members at some 160 bytes are 2.6 MB. The bitmaps of an object of 1 TiB,
blocks and 14 shards of each, fit too."""
MAX_HELLO = 64
MAX_K = 32
MAX_M = 8
MAX_REACH = 16
"""Hops from a keeper to the home: more cells in a row than the largest site has."""
MAX_ANNOUNCED = 1024
"""Digests in one Announce: a node with more of them sends several."""
MAX_HOLDERS = 1024
"""Peers in one Holders: more than any reader asks."""
MAX_PIGGYBACK = 256
"""Updates in a Ping, PingRequest or Pong, so that a probe stays small (Sync carries the whole view)."""
MAX_BITMAP = MAX_OBJECT_SIZE // BLOCK_SIZE // 8
MAX_BITMAPS = 64
"""Shards of one object that a node holds: one of each code that the site used as it grew, with room."""
MAX_SOURCE = 600
"""A registry's name (259), a repository's (255) and the kind."""
MAX_REFERENCE = 160
"""A tag has 128 characters at most, a sha512 digest 135."""
MAX_MEDIA_TYPE = 255
MAX_NAME = 255
MAX_ADDRESS = 262
"""A DNS name of 253 characters, or an IPv6 address in brackets, and a port."""
MAX_WEIGHT = 1e6
MAX_INCARNATION = 1 << 53
MAX_FAILURE_TEXT = 500
MAX_CERTIFICATE = 4096
"""Bytes of DER; Shoal's certificates take 450."""
MAX_TOLD = 64
"""Pieces of evidence in one message: with this many liars at once, no honest majority is left to report them."""

_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{1,64}", re.ASCII)


class Hello(msgspec.Struct, frozen=True, array_like=True):
    magic: bytes
    version: int
    lane: Literal["control", "urgent", "bulk"]
    plain: bool = False


Message = TypeVar("Message")
_Id = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
_HELLOS = msgspec.msgpack.Decoder(Hello)
_ENCODER = msgspec.msgpack.Encoder()
REQUESTS: msgspec.msgpack.Decoder[tuple[int, msg.Request]] = msgspec.msgpack.Decoder(tuple[_Id, msg.Request])
REPLIES: msgspec.msgpack.Decoder[tuple[int, msg.Reply]] = msgspec.msgpack.Decoder(tuple[_Id, msg.Reply])


@dataclass(frozen=True, slots=True)
class Head(Generic[Message]):
    """`size`: bytes of the header."""

    request_id: int
    message: Message
    body_length: int
    size: int = 0


def encode_hello(lane: str, plain: bool = False) -> bytes:
    header = _ENCODER.encode([MAGIC, VERSION, lane, plain] if plain else [MAGIC, VERSION, lane])
    return PREFIX.pack(len(header), 0) + header


def encode_head(request_id: int, message: msg.Request | msg.Reply, body_length: int) -> bytes:
    """Prefix and header of a frame. Raises ValueError where the message has no such body, or is too long to send."""
    header = _ENCODER.encode((request_id, message))
    if body_length != body_length_of(message) or len(header) > MAX_HEADER:
        name = type(message).__name__
        raise ValueError(f"{name} with a header of {len(header)} bytes and a body of {body_length} cannot be sent")
    return PREFIX.pack(len(header), body_length) + header


def body_length_of(message: msg.Request | msg.Reply) -> int:
    """Bytes that follow the message."""
    if isinstance(message, msg.ShardFound):
        return shard_length(message.record.length, message.k)
    if isinstance(message, msg.BlockFound):
        return message.record.length
    return 0


class Heads(Generic[Message]):
    """Parser of one direction of a connection: a hello, then heads of `kind` (REQUESTS or REPLIES), each with its body.

    After a head with a body the caller takes the part of it that arrived (`take`), reads the rest past this object, and
    only then feeds again. Holds at most one header and the last bytes fed. Unusable after an error.
    """

    def __init__(self, kind: msgspec.msgpack.Decoder[tuple[int, Message]]) -> None:
        self._kind = kind
        self._buffer = bytearray()

    @property
    def at_rest(self) -> bool:
        """Whether all fed bytes were consumed."""
        return not self._buffer

    def feed(self, data: Buffer) -> None:
        self._buffer += data

    def hello(self) -> Hello | None:
        """The first frame; None until all of it was fed."""
        frame = self._next_frame(MAX_HELLO)
        if frame is None:
            return None
        hello = decode(_HELLOS, frame[0])
        if hello.magic != MAGIC or hello.version != VERSION or frame[1]:
            raise PeerMisbehavedError(f"not the bulk channel's version {VERSION}: {hello.magic[:16]!r} {hello.version}")
        return hello

    def next(self) -> Head[Message] | None:
        """The next head; None until all of it was fed."""
        frame = self._next_frame(MAX_HEADER)
        if frame is None:
            return None
        request_id, message = decode(self._kind, frame[0])
        _check(message)
        expected = body_length_of(message)  # type: ignore[arg-type] # Message is a Request or a Reply
        if frame[1] != expected:
            raise PeerMisbehavedError(f"{type(message).__name__} with a body of {frame[1]} bytes, not {expected}")
        return Head(request_id, message, expected, len(frame[0]))

    def take(self, body: memoryview) -> int:
        """Copy the fed part of the body that follows the last head; returns its number of bytes."""
        size = min(len(body), len(self._buffer))
        body[:size] = self._buffer[:size]
        del self._buffer[:size]
        return size

    def _next_frame(self, limit: int) -> tuple[bytearray, int] | None:
        if len(self._buffer) < PREFIX.size:
            return None
        header_length, body_length = PREFIX.unpack_from(self._buffer)
        if header_length > limit or body_length > BLOCK_SIZE:
            raise PeerMisbehavedError(f"frame of {header_length} and {body_length} bytes is over the bounds")
        end = PREFIX.size + header_length
        if len(self._buffer) < end:
            return None
        header = self._buffer[PREFIX.size : end]
        del self._buffer[:end]
        return header, body_length


Decoded = TypeVar("Decoded")


def decode(decoder: msgspec.msgpack.Decoder[Decoded], data: Buffer) -> Decoded:
    try:
        return decoder.decode(data)
    except UNDECODABLE as error:
        raise PeerMisbehavedError(f"message cannot be decoded: {error}") from error


def check_answer(request: msg.Request, reply: msg.Reply) -> None:
    """Raises PeerMisbehavedError unless `reply` (already checked by itself) answers `request`."""
    if isinstance(reply, (msg.Failed, msg.Waiting)):
        return
    fits = isinstance(reply, _ANSWERS[type(request)])
    if isinstance(reply, (msg.ShardFound, msg.BlockFound)) and isinstance(request, (msg.GetShard, msg.GetBlock)):
        record = reply.record
        fits &= (record.digest, record.index, record.size) == (request.digest, request.index, request.size)
    if isinstance(reply, msg.ShardFound) and isinstance(request, msg.GetShard):
        fits &= (reply.k, reply.m) == (request.k, request.m) and (reply.index == request.want or not request.exact)
    if not fits:
        raise PeerMisbehavedError(f"{type(reply).__name__} does not answer this {type(request).__name__}")


_ANSWERS: dict[type[Any], type[Any]] = {
    msg.GetShard: msg.ShardFound,
    msg.GetBlock: msg.BlockFound,
    msg.GetHoldings: msg.HoldingsFound,
    msg.FindHolders: msg.Holders,
    msg.Announce: msg.Done,
    msg.Resolve: msg.Resolved,
    msg.Ping: msg.Pong,
    msg.PingRequest: msg.Pong,
    msg.Sync: msg.SyncReply,
    msg.Renew: msg.Renewed,
    msg.Accuse: msg.Accusations,
}


def _check(message: object) -> None:
    """The bounds that types do not express. Raises PeerMisbehavedError."""
    check = _CHECKS.get(type(message))
    if check is None:
        return
    try:
        check(message)
    except BadInputError as error:
        raise PeerMisbehavedError(f"{type(message).__name__}: {error}") from error


def _need(condition: bool, part: str) -> None:
    if not condition:
        raise BadInputError(f"{part} out of bounds")


def _block(message: msg.GetBlock | msg.GetShard | Record) -> None:
    ObjectRef(Digest.parse(message.digest), message.size).block(message.index)


def _code(k: int, m: int, index: int) -> None:
    _need(1 <= k <= MAX_K and 0 <= m <= MAX_M and 0 <= index < k + m, "code")


def _get_shard(message: msg.GetShard) -> None:
    _block(message)
    _code(message.k, message.m, message.want)
    _need(0 <= message.reach <= MAX_REACH, "reach")
    _need(not message.reader or _PEER_ID.fullmatch(message.reader) is not None, "reader")
    _need(len(message.source) <= MAX_SOURCE, "source")


def _record(record: Record) -> None:
    _block(record)
    _need(record.length == record.object.block_length(record.index), "length")
    _need(len(record.sha256) == 32 and len(record.signature) == 64, "record")
    _peer(record.signer)


def _shard_found(message: msg.ShardFound) -> None:
    _code(message.k, message.m, message.index)
    _record(message.record)


def _digests(digests: tuple[str, ...], most: int) -> None:
    _need(len(digests) <= most, "digests")
    for digest in digests:
        Digest.parse(digest)


def _peer(peer: str) -> None:
    _need(_PEER_ID.fullmatch(peer) is not None, "peer id")


def _holders(message: msg.Holders) -> None:
    _need(len(message.peers) <= MAX_HOLDERS, "peers")
    for peer in message.peers:
        _peer(peer)


def _resolve(message: msg.Resolve) -> None:
    _need(len(message.source) <= MAX_SOURCE, "source")
    _need(len(message.reference) <= MAX_REFERENCE, "reference")
    _need(0 <= message.reach <= 1, "reach")


def _resolved(message: msg.Resolved) -> None:
    ObjectRef(Digest.parse(message.digest), message.size)
    _need(len(message.media_type) <= MAX_MEDIA_TYPE, "media type")
    _need(math.isfinite(message.age_s) and message.age_s >= 0, "age")
    _need(math.isfinite(message.public_age_s) and (message.public_age_s >= 0 or message.public_age_s == -1), "age")


def _holdings(message: msg.HoldingsFound) -> None:
    _need(len(message.blocks) <= MAX_BITMAP and len(message.shards) <= MAX_BITMAPS, "holdings")
    for k, m, index, bitmap in message.shards:
        _code(k, m, index)
        _need(len(bitmap) <= MAX_BITMAP, "bitmap")


def is_text(text: str, most: int) -> bool:
    """Operators will see it: it has no control characters."""
    return len(text) <= most and text.isprintable()


def check_member(member: Member) -> None:
    """Raises BadInputError. The peer id is not checked."""
    _need(is_text(member.name, MAX_NAME) and is_text(member.site, MAX_NAME), "name or site")
    _need(len(member.addresses) <= MAX_ADDRESSES, "addresses")
    _need(all(is_text(address, MAX_ADDRESS) for address in member.addresses), "address")
    _need(0 <= member.weight <= MAX_WEIGHT, "weight")


def _updates(updates: tuple[Update, ...], most: int) -> None:
    _need(len(updates) <= most, "updates")
    for update in updates:
        _peer(update.member.peer_id)
        check_member(update.member)
        _need(0 <= update.incarnation <= MAX_INCARNATION, "incarnation")


def _ping_request(message: msg.PingRequest) -> None:
    _peer(message.target)
    _updates(message.updates, MAX_PIGGYBACK)


def _revocations(revocations: tuple[Revocation, ...]) -> None:
    """The caller, which has the authority's key, checks their signatures."""
    _need(len(revocations) <= MAX_REVOCATIONS, "revocations")
    for revocation in revocations:
        _need(is_text(revocation.subject, MAX_SUBJECT), "subject")
        _need(len(revocation.signature) == 64, "signature")


def _ping(message: msg.Ping) -> None:
    _updates(message.updates, MAX_PIGGYBACK)
    _revocations(message.revocations)


def _sync(message: msg.Sync | msg.SyncReply) -> None:
    _updates(message.updates, MAX_MEMBERS)
    _revocations(message.revocations)


def _certificate(message: msg.Renew | msg.Renewed) -> None:
    _need(len(message.certificate) <= MAX_CERTIFICATE, "certificate")


def _evidence(message: msg.Accuse | msg.Accusations) -> None:
    _need(len(message.told) <= MAX_TOLD, "evidence")
    for evidence, age_s in message.told:
        for record in (evidence.record, evidence.other):
            if record is not None:
                _record(record)
        _peer(evidence.finder)
        _need(len(evidence.source) <= MAX_SOURCE and len(evidence.signature) == 64, "evidence")
        _need(math.isfinite(age_s) and age_s >= 0, "age")


def _failed(message: msg.Failed) -> None:
    _need(message.code in msg.FAILURES and len(message.text) <= MAX_FAILURE_TEXT, "failure")


_CHECKS: dict[type[Any], Callable[[Any], None]] = {
    msg.GetShard: _get_shard,
    msg.GetBlock: _block,
    msg.GetHoldings: lambda message: _digests((message.digest,), 1),
    msg.FindHolders: lambda message: _digests((message.digest,), 1),
    msg.Announce: lambda message: _digests(message.digests, MAX_ANNOUNCED),
    msg.Resolve: _resolve,
    msg.Ping: _ping,
    msg.PingRequest: _ping_request,
    msg.Sync: _sync,
    msg.Renew: _certificate,
    msg.ShardFound: _shard_found,
    msg.BlockFound: lambda message: _record(message.record),
    msg.HoldingsFound: _holdings,
    msg.Holders: _holders,
    msg.Resolved: _resolved,
    msg.Pong: lambda message: _updates(message.updates, MAX_PIGGYBACK),
    msg.SyncReply: _sync,
    msg.Renewed: _certificate,
    msg.Failed: _failed,
    msg.Accuse: _evidence,
    msg.Accusations: _evidence,
}
