"""Frames of the bulk channel: bytes to messages and back. The bytes are specified in docs/PROTOCOL.md, "Bulk channel".

A frame is a prefix (u32 header length, u32 body length, both big-endian), a msgpack header `[request id, message]`, and
a raw body. Nothing here does I/O: `Heads` is fed the bytes that arrived and returns heads. It leaves the body to the
caller, which knows its length from the head and can let the socket write it into its final buffer.

The bounds of all messages of this channel are checked in this file; a message beyond them raises PeerMisbehavedError.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, get_args

import msgspec

from protocol import messages as msg
from protocol.admission import MAX_REVOCATIONS, MAX_SUBJECT, Revocation
from protocol.errors import UNDECODABLE, BadInputError, NotAdmittedError, PeerMisbehavedError
from protocol.evidence import Evidence
from protocol.ids import BLOCK_SIZE, MAX_OBJECT_SIZE, Buffer, Digest, ObjectRef, PeerId, shard_length
from protocol.member_table import KEY
from protocol.members import (
    MAX_ADDRESSES,
    MAX_MEMBERS,
    MAX_WEIGHT,
    MIN_WEIGHT,
    Member,
    News,
    Statement,
    Suspicion,
)
from protocol.records import Record
from protocol.shard_proofs import ShardProof
from protocol.statements import NONCE, SEAL
from protocol.summary import MAX_STATEMENTS, ROW

PREFIX = struct.Struct(">II")
MAGIC = b"shoal-bulk"
VERSION = 4
MAX_HEADER = 4 << 20
"""The largest message is a HoldingsFound: the bitmaps of an object of 1 TiB, blocks and 14 shards of each, are 2 MB."""
MAX_HELLO = 64
MAX_K = 32
MAX_M = 8
MAX_WANTED = 16
"""Blocks from the first to the last of one GetShards: four stripes in the middle of an object."""
MAX_WAITING = 512
"""Requests in one Waiting: as many as the asking side may have open on a connection."""
MAX_HOPS = 16
"""Hops from a keeper to the home: more cells in a row than the largest site has."""
MAX_ANNOUNCED = 1024
"""Digests in one Announce: a node with more of them sends several."""
MAX_HOLDERS = 1024
"""Peers in one Holders: more than any reader asks."""
MAX_SUSPICIONS = 64
"""Suspicions in one message: a node sends at most SwimConfig.piggyback of them."""
MAX_BITMAP = MAX_OBJECT_SIZE // BLOCK_SIZE // 8
MAX_BITMAPS = 64
"""Bitmaps of shards in one HoldingsFound: one for each index of each code that the site used as it grew, with room."""
MAX_SOURCE = 600
"""A registry's name (259), a repository's (255) and the kind."""
ORIGIN_LENGTH = 16
"""Bytes of the mark of a private object, cut from a SHA-256: two repositories never have the same."""
MAX_REFERENCE = 160
"""A tag has 128 characters at most, a sha512 digest 135."""
MAX_MEDIA_TYPE = 255
MAX_NAME = 255
MAX_ADDRESS = 262
"""A DNS name of 253 characters, or an IPv6 address in brackets, and a port."""
MAX_INCARNATION = 1 << 53
MAX_FAILURE_TEXT = 500
MAX_CERTIFICATE = 4096
"""Bytes of DER; Shoal's certificates take 450."""
MAX_TOLD = 64
"""Pieces of evidence in one message: with this many liars at once, no honest majority is left to report them."""

MAX_PEER_ID = 64

_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]+", re.ASCII)


class Hello(msgspec.Struct, frozen=True, array_like=True):
    magic: bytes
    version: int
    lane: Literal["control", "urgent", "bulk"]
    plain: bool = False


Message = TypeVar("Message")
MAX_ID = 0xFFFFFFFF
_Id = Annotated[int, msgspec.Meta(ge=1, le=MAX_ID)]
_ReplyId = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
_HELLOS = msgspec.msgpack.Decoder(Hello)
_ENCODER = msgspec.msgpack.Encoder()
REQUESTS: msgspec.msgpack.Decoder[tuple[int, msg.Request]] = msgspec.msgpack.Decoder(tuple[_Id, msg.Request])
REPLIES: msgspec.msgpack.Decoder[tuple[int, msg.Reply]] = msgspec.msgpack.Decoder(tuple[_ReplyId, msg.Reply])


class Head(NamedTuple, Generic[Message]):
    """`size`: bytes of the header."""

    request_id: int
    message: Message
    body_length: int
    size: int = 0


def encode_hello(lane: str, plain: bool = False) -> bytes:
    header = _ENCODER.encode([MAGIC, VERSION, lane, plain] if plain else [MAGIC, VERSION, lane])
    return PREFIX.pack(len(header), 0) + header


def encode_head(request_id: int, message: msg.Request | msg.Reply, body_length: int) -> bytes:
    """Prefix and header of a frame. Raises ValueError if the message has no such body, or is too long to send."""
    header = _ENCODER.encode((request_id, message))
    if body_length != body_length_of(message) or len(header) > MAX_HEADER:
        name = type(message).__name__
        raise ValueError(f"{name} with a header of {len(header)} bytes and a body of {body_length} cannot be sent")
    return PREFIX.pack(len(header), body_length) + header


def body_length_of(message: msg.Request | msg.Reply) -> int:
    """Bytes that follow the message."""
    if isinstance(message, msg.ShardFound):
        return shard_length(message.record.length, message.k)
    return 0


class Heads(Generic[Message]):
    """Parser of one direction of a connection: a hello, then heads of `kind` (REQUESTS or REPLIES), each with its body.
    After a head with a body, the caller takes the part of the body that was fed (`take`), reads the rest by itself, and
    only then feeds again. Holds at most one header and the last bytes fed. Unusable after an error."""

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
        """The caller checks the version."""
        frame = self._next_frame(MAX_HELLO)
        if frame is None:
            return None
        hello = decode(_HELLOS, frame[0])
        if hello.magic != MAGIC or frame[1]:
            raise PeerMisbehavedError(f"not the bulk channel: {hello.magic[:16]!r}")
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
        if size:
            with memoryview(self._buffer) as fed:
                body[:size] = fed[:size]
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


def parts_of(request: msg.Request) -> int:
    """The blocks that the request asks for, as bits; 0 if it has a single answer."""
    return request.wanted if isinstance(request, msg.GetShards) else 0


def check_answer(request: msg.Request, reply: msg.Reply, missing: int) -> int:
    """What is missing after `reply` of the parts that were `missing` before (`parts_of`): 0 if the answer is complete.

    Raises PeerMisbehavedError unless `reply` (already checked by itself) answers `request`, and is no part that came
    before.
    """
    if isinstance(reply, msg.Failed):
        return 0
    fits = isinstance(reply, _ANSWERS[type(request)])
    if isinstance(reply, msg.ShardFound) and isinstance(request, msg.GetShards):
        record, bit = reply.record, reply.record.index - request.first
        fits = bit >= 0 and bool(missing >> bit & 1) and (record.digest, record.size) == (request.digest, request.size)
        fits &= (reply.k, reply.m, reply.index) == (request.k, request.m, request.want)
        missing &= ~(1 << max(bit, 0))
    if not fits:
        raise PeerMisbehavedError(f"{type(reply).__name__} does not answer this {type(request).__name__}")
    return missing


_ANSWERS: dict[type[Any], type[Any]] = {
    msg.GetShards: msg.ShardFound,
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


def is_text(text: str, most: int) -> bool:
    """Whether operators may see `text`: it is short, and has no control characters."""
    return len(text) <= most and text.isprintable()


def check_version(protocol: str, theirs: int, ours: int, peer: PeerId) -> None:
    """Raises NotAdmittedError, with a text for the log, unless the versions of `peer` and this node are equal."""
    if theirs != ours:
        remedy = "it" if theirs < ours else "this node"
        text = f"it speaks version {theirs} of the {protocol}, this node speaks {ours}: upgrade {remedy}"
        raise NotAdmittedError(text, peer)


def check_member(member: Member) -> None:
    """Raises BadInputError. The peer id is not checked."""
    _need(is_text(member.name, MAX_NAME) and is_text(member.site, MAX_NAME), "name or site")
    _need(len(member.addresses) <= MAX_ADDRESSES, "addresses")
    _need(all(is_text(address, MAX_ADDRESS) for address in member.addresses), "address")
    _need(member.weight == 0 or MIN_WEIGHT <= member.weight <= MAX_WEIGHT, "weight")


def check_statement(statement: Statement) -> None:
    """Raises BadInputError. Neither signature nor certificate is checked."""
    check_member(statement.member)
    _need(_is_peer(statement.peer_id), "peer id")
    _need(1 <= statement.incarnation <= MAX_INCARNATION, "incarnation")
    _need(len(statement.seal) == SEAL and len(statement.signature) == 64, "seal or signature")
    _need(len(statement.certificate) <= MAX_CERTIFICATE, "certificate")


def _need(condition: bool, part: str) -> None:
    if not condition:
        raise BadInputError(f"{part} out of bounds")


@lru_cache(256)
def _object(digest: str, size: int) -> ObjectRef:
    """The parts of a stream, and streams of an object, repeat it."""
    return ObjectRef(Digest.parse(digest), size)


def _code(k: int, m: int, index: int) -> None:
    _need(1 <= k <= MAX_K and 0 <= m <= MAX_M and 0 <= index < k + m, "code")


def _is_peer(peer: str) -> bool:
    return len(peer) <= MAX_PEER_ID and _is_base58(peer)


@lru_cache(1024)
def _is_base58(peer: str) -> bool:
    return _PEER_ID.fullmatch(peer) is not None


def _record(record: Record) -> bool:
    ref = _object(record.digest, record.size)
    fits = 0 <= record.index < ref.block_count and record.length == ref.block_length(record.index)
    return fits and _is_peer(record.signer) and len(record.sha256) == 32 and len(record.signature) == 64


def _proof(proof: ShardProof | None) -> bool:
    return proof is None or (_is_peer(proof.maker) and len(proof.sha256) == 32 and len(proof.signature) == 64)


def _shards(shards: tuple[tuple[int, int, int, bytes], ...]) -> bool:
    for k, m, index, _ in shards:
        _code(k, m, index)
    return len(shards) <= MAX_BITMAPS and all(len(bitmap) <= MAX_BITMAP for *_, bitmap in shards)


def _waiting(requests: tuple[tuple[int, int], ...]) -> bool:
    return len(requests) <= MAX_WAITING and all(1 <= number <= MAX_ID and 0 <= state <= 2 for number, state in requests)


def _statements(statements: tuple[Statement, ...]) -> bool:
    for statement in statements:
        check_statement(statement)
    return len(statements) <= MAX_STATEMENTS


def _suspicion(suspicion: Suspicion) -> bool:
    is_about = _is_peer(suspicion.peer_id) and 1 <= suspicion.incarnation <= MAX_INCARNATION
    return is_about and _is_peer(suspicion.accuser) and len(suspicion.signature) == 64


def _news(news: News) -> bool:
    are_suspicions = len(news.suspicions) <= MAX_SUSPICIONS and all(map(_suspicion, news.suspicions))
    return are_suspicions and _statements(news.statements) and 0 <= news.held <= MAX_INCARNATION


def _keys(keys: bytes) -> bool:
    return len(keys) <= KEY * MAX_STATEMENTS and not len(keys) % KEY


def _revocation(revocation: Revocation) -> bool:
    """The caller, which has the authority's key, checks the signature."""
    return is_text(revocation.subject, MAX_SUBJECT) and len(revocation.signature) == 64


def _evidence(evidence: Evidence, age_s: float) -> bool:
    records = _record(evidence.record) and (evidence.other is None or _record(evidence.other))
    bounded = len(evidence.source) <= MAX_SOURCE and len(evidence.signature) == 64
    return records and bounded and _is_peer(evidence.finder) and _is_age(age_s)


def _is_age(age_s: float) -> bool:
    return math.isfinite(age_s) and age_s >= 0


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "source": lambda source: len(source) <= MAX_SOURCE,
    "origin": lambda origin: len(origin) in (0, ORIGIN_LENGTH),
    "reader": lambda peer: not peer or _is_peer(peer),
    "asker": lambda peer: not peer or _is_peer(peer),
    "digests": lambda digests: len(digests) <= MAX_ANNOUNCED and all(map(Digest.parse, digests)),
    "reference": lambda reference: len(reference) <= MAX_REFERENCE,
    "requests": _waiting,
    "news": _news,
    "own": lambda statement: _statements((statement,)),
    "statements": _statements,
    "summary": lambda summary: len(summary) <= ROW.size * MAX_MEMBERS and not len(summary) % ROW.size,
    "doubts": _keys,
    "wanted": lambda wanted: isinstance(wanted, int) or _keys(wanted),  # an integer: _get_shards
    "nonce": lambda nonce: len(nonce) in (0, NONCE),
    "liveness": lambda proof: len(proof) in (0, 64),
    "revocations": lambda values: len(values) <= MAX_REVOCATIONS and all(map(_revocation, values)),
    "target": _is_peer,
    "certificate": lambda certificate: len(certificate) <= MAX_CERTIFICATE,
    "told": lambda pairs: len(pairs) <= MAX_TOLD and all(_evidence(*pair) for pair in pairs),
    "record": _record,
    "proof": _proof,
    "blocks": lambda bitmap: len(bitmap) <= MAX_BITMAP,
    "shards": _shards,
    "peers": lambda peers: len(peers) <= MAX_HOLDERS and all(map(_is_peer, peers)),
    "media_type": lambda text: len(text) <= MAX_MEDIA_TYPE,
    "age_s": _is_age,
    "public_age_s": lambda age_s: age_s == -1 or _is_age(age_s),
    "code": lambda code: code in msg.FAILURES,
    "text": lambda text: len(text) <= MAX_FAILURE_TEXT,
}
"""For each field name, the bounds in all messages with a field of this name."""


def _get_shards(message: msg.GetShards) -> None:
    _need(message.wanted & 1 == 1 and 0 < message.wanted < 1 << MAX_WANTED and message.first >= 0, "wanted blocks")
    _object(message.digest, message.size).block(message.first + message.wanted.bit_length() - 1)
    _code(message.k, message.m, message.want)
    _need(0 <= message.hops <= MAX_HOPS, "hops")


_MORE: dict[type[Any], Callable[[Any], object]] = {
    msg.GetShards: _get_shards,
    msg.GetHoldings: lambda message: Digest.parse(message.digest),
    msg.FindHolders: lambda message: Digest.parse(message.digest),
    msg.PingRequest: lambda message: _need(len(message.nonce) == NONCE, "nonce"),
    msg.ShardFound: lambda message: _code(message.k, message.m, message.index),
    msg.Resolved: lambda message: ObjectRef(Digest.parse(message.digest), message.size),
}
"""Bounds that involve several fields, or hold for one message only. They are checked first."""

_CHECKS = {
    kind: [(name, _FIELDS[name]) for name in kind.__struct_fields__ if name in _FIELDS]
    for kind in get_args(msg.Request) + get_args(msg.Reply)
}


def _check(message: object) -> None:
    kind = type(message)
    try:
        if kind in _MORE:
            _MORE[kind](message)
        for name, fits in _CHECKS[kind]:
            _need(fits(getattr(message, name)), name)
    except BadInputError as error:
        raise PeerMisbehavedError(f"{kind.__name__}: {error}") from error
