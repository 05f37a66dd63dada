"""Framing of the bulk channel: every valid message comes through, and hostile bytes are refused."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import wire
from protocol.errors import NotAdmittedError, PeerMisbehavedError
from protocol.evidence import Evidence
from protocol.ids import BLOCK_SIZE, MAX_OBJECT_SIZE, Digest, ObjectRef, PeerId
from protocol.members import MAX_MEMBERS, Member, News, Statement, Suspicion
from protocol.messages import (
    FAILURES,
    Accusations,
    Accuse,
    Announce,
    Done,
    Failed,
    FindHolders,
    GetHoldings,
    GetShards,
    Holders,
    HoldingsFound,
    Ping,
    PingRequest,
    Pong,
    Reply,
    Request,
    Resolve,
    Resolved,
    ShardFound,
    Sync,
    SyncReply,
    Waiting,
)
from protocol.records import Record
from protocol.shard_proofs import ShardProof
from protocol.summary import MAX_STATEMENTS

B58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
DIGEST = "sha256:" + "0" * 64
PEER = PeerId("12D3KooW" + "x" * 44)

hexadecimal = st.text("0123456789abcdef", min_size=64, max_size=64)
digests = hexadecimal.map(lambda text: f"sha256:{text}") | hexadecimal.map(lambda text: f"sha512:{text}{text}")
peers = st.text(B58, min_size=1, max_size=64).map(PeerId)
sizes = st.integers(1, MAX_OBJECT_SIZE)
blocks = sizes.flatmap(lambda size: st.tuples(st.integers(0, (size - 1) // BLOCK_SIZE), st.just(size)))


@st.composite
def stretches(draw: st.DrawFn) -> tuple[int, int, int]:
    """The first block, the wanted ones as bits, and the object's size."""
    first, size = draw(blocks)
    last = min((size - 1) // BLOCK_SIZE - first, wire.MAX_WANTED - 1)
    return first, draw(st.integers(0, (1 << last) - 1)) << 1 | 1, size


codes = st.tuples(st.integers(1, wire.MAX_K), st.integers(0, wire.MAX_M)).flatmap(
    lambda code: st.tuples(st.just(code[0]), st.just(code[1]), st.integers(0, sum(code) - 1))
)
texts = st.text(st.characters(codec="utf-8"), max_size=60)
printable = texts.filter(str.isprintable)
bitmaps = st.binary(max_size=40)
signatures = st.binary(min_size=64, max_size=64)
ages, object_sizes = st.floats(0, 1e9), st.integers(0, MAX_OBJECT_SIZE)
addresses = st.lists(printable, max_size=8).map(tuple)
members = st.builds(Member, peers, printable, printable, addresses=addresses, weight=st.just(0.0) | st.floats(0.5, 2))
incarnations = st.integers(1, wire.MAX_INCARNATION)
statements = st.builds(
    Statement,
    members,
    incarnations,
    leaving=st.booleans(),
    seal=st.binary(min_size=16, max_size=16),
    signature=signatures,
    certificate=st.binary(max_size=50),
)
suspicions = st.builds(Suspicion, peers, incarnations, peers, signatures)
news = st.builds(
    News,
    st.lists(statements, max_size=4).map(tuple),
    st.lists(suspicions, max_size=4).map(tuple),
    held=st.just(0) | incarnations,
    doubted=st.booleans(),
)
nonces = st.binary(min_size=16, max_size=16)
keys = st.lists(st.binary(min_size=8, max_size=8), max_size=4).map(b"".join)
summaries = st.lists(st.binary(min_size=16, max_size=16), max_size=4).map(b"".join)


@st.composite
def records(draw: st.DrawFn) -> Record:
    index, size = draw(blocks)
    digest = draw(digests)
    length = ObjectRef(Digest.parse(digest), size).block_length(index)
    sha = draw(st.binary(min_size=32, max_size=32))
    return Record(digest, index, length, size, sha256=sha, signer=draw(peers), signature=draw(signatures))


accusations = st.lists(
    st.tuples(
        st.builds(Evidence, records(), texts, peers, signature=signatures, other=st.none() | records()),
        ages,
    ),
    max_size=3,
).map(tuple)

proofs = st.builds(ShardProof, peers, st.binary(min_size=32, max_size=32), signatures)


REQUESTS: list[st.SearchStrategy[Request]] = [
    st.builds(
        lambda digest, stretch, code, **rest: GetShards(digest, *stretch, *code, **rest),
        digests,
        stretches(),
        codes,
        hops=st.integers(0, 2),
        source=texts,
        reader=st.just("") | peers,
        background=st.booleans(),
        asker=st.just("") | peers,
        keep=st.booleans(),
        reached=st.booleans(),
    ),
    st.builds(GetHoldings, digests),
    st.builds(FindHolders, digests),
    st.builds(Announce, st.lists(digests, max_size=5).map(tuple)),
    st.builds(Resolve, texts, texts),
    st.builds(Ping, news, st.just(b"") | nonces),
    st.builds(PingRequest, peers, nonces, news),
    st.builds(Sync, statements, summaries),
    st.builds(Accuse, accusations),
]
REPLIES: list[st.SearchStrategy[Reply]] = [
    st.builds(lambda code, record, proof: ShardFound(*code, record, proof=proof), codes, records(), st.none() | proofs),
    st.builds(
        HoldingsFound,
        bitmaps,
        st.lists(st.builds(lambda code, bits: (*code, bits), codes, bitmaps), max_size=5).map(tuple),
    ),
    st.builds(Holders, st.lists(peers, max_size=5).map(tuple)),
    st.just(Done()),
    st.builds(Resolved, digests, object_sizes, texts, age_s=ages, public_age_s=st.just(-1.0) | ages),
    st.builds(Pong, news, st.just(b"") | signatures),
    st.builds(SyncReply, st.lists(statements, max_size=4).map(tuple), keys, keys, st.booleans()),
    st.builds(Waiting, st.lists(st.tuples(st.integers(1, wire.MAX_ID), st.integers(0, 2)), max_size=5).map(tuple)),
    st.builds(Failed, st.sampled_from(FAILURES), texts),
    st.builds(Accusations, accusations),
]
requests, replies = st.one_of(REQUESTS), st.one_of(REPLIES)
ids = st.integers(1, wire.MAX_ID)


def frame(header: bytes, body_length: int = 0) -> bytes:
    return struct.pack(">II", len(header), body_length) + header


def body_of(length: int) -> bytes:
    return (bytes(range(251)) * (length // 251 + 1))[:length]


def encoded(request_id: int, message: Request | Reply) -> bytes:
    length = wire.body_length_of(message)
    return wire.encode_head(request_id, message, length) + body_of(length)


def read_all(kind: Any, data: bytes, chunk: int) -> list[tuple[wire.Head[Any], bytes]]:
    """Read as a connection does: feed bytes to decode heads, and read the rest of a body past the decoder."""
    heads, position, read = wire.Heads(kind), 0, []
    while True:
        while (head := heads.next()) is None:
            if position == len(data):
                return read
            heads.feed(data[position : position + chunk])
            position += chunk
            position = min(position, len(data))
        body = bytearray(head.body_length)
        taken = heads.take(memoryview(body))
        body[taken:] = data[position : position + head.body_length - taken]
        position += head.body_length - taken
        read.append((head, bytes(body)))


@given(st.lists(st.tuples(ids, requests), max_size=4), st.integers(1, 100))
def test_requests_are_decoded_from_chunks_of_any_size(said: list[tuple[int, Request]], chunk: int) -> None:
    data = b"".join(encoded(*pair) for pair in said)
    for size in (1, chunk, len(data) + 1):
        assert [(head.request_id, head.message) for head, _ in read_all(wire.REQUESTS, data, size)] == said


@given(st.lists(st.tuples(ids, replies), max_size=4), st.integers(1, 20000))
@settings(max_examples=60)
def test_replies_and_bodies_are_decoded_from_chunks_of_any_size(said: list[tuple[int, Reply]], chunk: int) -> None:
    data = b"".join(encoded(*pair) for pair in said)
    for size in (1, chunk, len(data) + 1):
        read = read_all(wire.REPLIES, data, size)
        assert [(head.request_id, head.message) for head, _ in read] == said
        assert all(body == body_of(wire.body_length_of(head.message)) for head, body in read)


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1))
def test_garbage_is_misbehaviour_or_not_yet_a_frame(header: bytes, body_length: int) -> None:
    """S-20"""
    for kind in (wire.REQUESTS, wire.REPLIES):
        for data in (header, frame(header, body_length), frame(header)):
            heads = wire.Heads(kind)
            heads.feed(data)
            try:
                heads.next()
            except PeerMisbehavedError:
                continue


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | texts
    | st.binary(max_size=70)
    | digests,
    lambda inner: st.lists(inner, max_size=10) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=30,
)


@given(st.sampled_from([*range(1, 10), *range(32, 42), 99]), st.lists(values, max_size=10))
def test_hostile_values_are_misbehaviour_or_within_the_bounds(tag: int, fields: list[Any]) -> None:
    header = msgpack.packb([1, [tag, *fields]])
    for kind in (wire.REQUESTS, wire.REPLIES):
        heads = wire.Heads(kind)
        heads.feed(frame(header))
        try:
            head = heads.next()
        except PeerMisbehavedError:
            continue
        assert head is not None
        assert head.body_length == wire.body_length_of(head.message) == 0


@given(requests | replies, st.data())
def test_a_valid_header_that_was_altered_never_breaks_the_reader(message: Request | Reply, data: st.DataObject) -> None:
    raw = bytearray(encoded(7, message)[: 8 + len(msgspec.msgpack.encode((7, message)))])
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= data.draw(st.integers(1, 255))
    for kind in (wire.REQUESTS, wire.REPLIES):
        heads = wire.Heads(kind)
        heads.feed(raw)
        try:
            head = heads.next()
        except PeerMisbehavedError:
            continue
        assert head is None or head.body_length <= BLOCK_SIZE


@pytest.mark.parametrize(
    "header",
    [
        b"\x92\x01\x92\x03\xa2\xff\xfe",
        b"\x92\x01\x93\x03\xa1a" + b"\x91" * 300_000,
        b"\x92\x01\x92\x05\xdd\xff\xff\xff\xff",
        b"\x92\x01\x92\x03\xdb\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\x92\x01\x92\x07\xdd\x7f\xff\xff\xff" + b"\x93" * 1000,
    ],
    ids=["utf-8", "nesting", "array length", "string length", "outer length", "updates length"],
)
def test_claimed_lengths_allocate_nothing(header: bytes) -> None:
    """S-20"""
    tracemalloc.start()
    heads = wire.Heads(wire.REQUESTS)
    heads.feed(frame(header))
    with pytest.raises(PeerMisbehavedError):
        heads.next()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(header) + 100_000


@pytest.mark.parametrize(
    "prefix", [(wire.MAX_HEADER + 1, 0), (2**32 - 1, 0), (10, BLOCK_SIZE + 1), (0, 2**32 - 1), (2**32 - 1, 2**32 - 1)]
)
def test_a_prefix_over_the_bounds_is_refused_before_its_header_arrives(prefix: tuple[int, int]) -> None:
    """S-20"""
    heads = wire.Heads(wire.REPLIES)
    heads.feed(struct.pack(">II", *prefix))
    with pytest.raises(PeerMisbehavedError):
        heads.next()


STATEMENT = Statement(
    Member(PEER, "node-1", "default", ("10.0.0.1:4502",)), 1, leaving=False, seal=bytes(16), signature=bytes(64)
)
SUSPICION = Suspicion(PEER, 1, PEER, bytes(64))
RECORD = Record(DIGEST, 0, 10, 10, sha256=bytes(32), signer=PEER, signature=bytes(64))


def altered(**changes: Any) -> Record:
    return msgspec.structs.replace(RECORD, **changes)


EVIDENCE = Evidence(RECORD, "", PEER, bytes(64))


def get_shards(**changes: Any) -> GetShards:
    good = GetShards(DIGEST, 0, 1, 10, k=4, m=1, want=0, hops=0, source="")
    return msgspec.structs.replace(good, **changes)


def told_of(age_s: float = 0.0, **changes: Any) -> Accuse:
    return Accuse(((msgspec.structs.replace(EVIDENCE, **changes), age_s),))


def saying(*statements: Statement) -> Ping:
    return Ping(News(statements))


def ping(**changes: Any) -> Ping:
    return saying(msgspec.structs.replace(STATEMENT, **changes))


def ping_of(**changes: Any) -> Ping:
    return ping(member=msgspec.structs.replace(STATEMENT.member, **changes))


def suspecting(**changes: Any) -> Ping:
    return Ping(News((), (msgspec.structs.replace(SUSPICION, **changes),)))


@pytest.mark.parametrize(
    "message",
    [
        get_shards(k=0),
        get_shards(k=33),
        get_shards(m=9),
        get_shards(m=-1),
        get_shards(want=5),
        get_shards(want=-1),
        get_shards(hops=17),
        get_shards(source="x" * 601),
        get_shards(first=1),
        get_shards(first=-1),
        get_shards(first=-1, wanted=3),
        get_shards(wanted=0),
        get_shards(wanted=-1),
        get_shards(wanted=2, size=2 * BLOCK_SIZE),
        get_shards(wanted=3),
        get_shards(wanted=(1 << 16) + 1, size=MAX_OBJECT_SIZE),
        get_shards(size=0),
        get_shards(size=MAX_OBJECT_SIZE + 1),
        get_shards(digest=DIGEST.upper()),
        GetHoldings("md5:00"),
        FindHolders(DIGEST + "0"),
        Announce((DIGEST,) * 1025),
        Announce((DIGEST, "")),
        Resolve("x" * 601, "latest"),
        Resolve("", "x" * 161),
        saying(*(STATEMENT,) * (MAX_STATEMENTS + 1)),
        ping_of(weight=float("nan")),
        ping_of(weight=-1.0),
        ping_of(weight=2.1),
        ping_of(weight=0.1),
        ping_of(name="\x1b[2J"),
        ping_of(addresses=("a:1",) * 9),
        ping_of(addresses=("a\0:1",)),
        ping_of(peer_id="../../etc"),
        ping(incarnation=0),
        ping(incarnation=wire.MAX_INCARNATION + 1),
        ping(seal=bytes(15)),
        ping(signature=b""),
        ping(certificate=bytes(wire.MAX_CERTIFICATE + 1)),
        Ping(News((), (SUSPICION,) * (wire.MAX_SUSPICIONS + 1))),
        Ping(News(held=-1)),
        Ping(News(held=wire.MAX_INCARNATION + 1)),
        Ping(nonce=bytes(15)),
        suspecting(peer_id=PeerId("0")),
        suspecting(accuser=PeerId("")),
        suspecting(incarnation=0),
        suspecting(signature=bytes(63)),
        PingRequest(PeerId(""), bytes(16)),
        PingRequest(PEER, b""),
        Pong(liveness=bytes(63)),
        Sync(STATEMENT, bytes(16 * (MAX_MEMBERS + 1))),
        Sync(STATEMENT, bytes(15)),
        Sync(msgspec.structs.replace(STATEMENT, incarnation=0), b""),
        SyncReply((STATEMENT,) * (MAX_STATEMENTS + 1)),
        SyncReply((), doubts=bytes(7)),
        SyncReply((), wanted=bytes(8 * (MAX_STATEMENTS + 1))),
        ShardFound(4, 1, 5, RECORD),
        ShardFound(4, 1, 0, RECORD, proof=ShardProof(PEER, bytes(31), bytes(64))),
        ShardFound(4, 1, 0, RECORD, proof=ShardProof(PEER, bytes(32), bytes(65))),
        ShardFound(4, 1, 0, RECORD, proof=ShardProof(PeerId("0"), bytes(32), bytes(64))),
        ShardFound(4, 1, 0, altered(length=9)),
        ShardFound(4, 1, 0, altered(length=0, size=0)),
        ShardFound(4, 1, 0, altered(sha256=b"")),
        ShardFound(4, 1, 0, altered(signature=bytes(65))),
        ShardFound(4, 1, 0, altered(signer=PeerId("0"))),
        Waiting(((0, 0),)),
        Waiting(((wire.MAX_ID + 1, 0),)),
        Waiting(((1, 3),)),
        Waiting(((1, -1),)),
        Waiting(((1, 0),) * (wire.MAX_WAITING + 1)),
        HoldingsFound(bytes(wire.MAX_BITMAP + 1), ()),
        HoldingsFound(b"", ((4, 1, 0, b""),) * 65),
        HoldingsFound(b"", ((4, 1, 5, b""),)),
        Holders((PeerId("not base58!"),)),
        Holders((PEER,) * 1025),
        Resolved(DIGEST, -1, "", 0.0),
        Resolved(DIGEST, 1, "", float("inf")),
        Resolved(DIGEST, 1, "", -1.0),
        Resolved(DIGEST, 1, "", 0.0, public_age_s=-0.5),
        Resolved(DIGEST, 1, "", 0.0, public_age_s=float("nan")),
        get_shards(reader="not base58!"),
        get_shards(asker="not base58!"),
        Accuse(((EVIDENCE, 0.0),) * (wire.MAX_TOLD + 1)),
        told_of(source="x" * 601),
        told_of(finder=PeerId("0")),
        told_of(signature=bytes(63)),
        told_of(record=altered(sha256=b"")),
        told_of(other=altered(signature=b"")),
        told_of(age_s=-1.0),
        told_of(age_s=float("inf")),
        Failed("oops", ""),
        Failed("busy", "x" * 501),
    ],
)
def test_bounds(message: Request | Reply) -> None:
    """S-20"""
    heads = wire.Heads(wire.REQUESTS if type(message).__struct_config__.tag < 32 else wire.REPLIES)
    heads.feed(wire.encode_head(1, message, wire.body_length_of(message)))
    with pytest.raises(PeerMisbehavedError):
        heads.next()


def test_a_body_must_be_as_long_as_its_message_says() -> None:
    for message, length in ((ShardFound(1, 0, 0, RECORD), 9), (ShardFound(4, 1, 0, RECORD), 10), (Done(), 1)):
        with pytest.raises(ValueError, match="cannot be sent"):
            wire.encode_head(1, message, length)
        heads = wire.Heads(wire.REPLIES)
        heads.feed(frame(msgspec.msgpack.encode((1, message)), length))
        with pytest.raises(PeerMisbehavedError):
            heads.next()


def test_a_request_has_a_number() -> None:
    """0 is that of Waiting, which belongs to no request."""
    heads = wire.Heads(wire.REQUESTS)
    heads.feed(wire.encode_head(0, Ping(), 0))
    with pytest.raises(PeerMisbehavedError):
        heads.next()


LARGE = 20 * BLOCK_SIZE


def part(index: int, /, **changes: Any) -> ShardFound:
    record = altered(index=index, size=LARGE, length=BLOCK_SIZE)
    return msgspec.structs.replace(ShardFound(4, 1, 2, record), **changes)


@given(st.integers(1, 10), st.integers(0, 2**15 - 1).map(lambda bits: bits << 1 | 1), st.randoms())
def test_a_stream_ends_with_the_last_wanted_part_whatever_the_order(first: int, wanted: int, rng: Any) -> None:
    """Each part is accepted once, and no other block is."""
    wanted &= (1 << 20 - first) - 1
    request = get_shards(first=first, wanted=wanted, size=LARGE, want=2)
    indices = [first + bit for bit in range(16) if wanted >> bit & 1]
    rng.shuffle(indices)
    missing, came = wire.parts_of(request), set()
    for index in indices:
        assert missing
        for other in range(20):
            if other in came or other not in indices:
                with pytest.raises(PeerMisbehavedError):
                    wire.check_answer(request, part(other), missing)
        missing = wire.check_answer(request, part(index), missing)
        came.add(index)
    assert not missing


@pytest.mark.parametrize(
    "reply",
    [
        part(1, k=3),
        part(1, m=0),
        part(1, index=1),
        part(1, record=altered(index=1, size=LARGE + 1, length=BLOCK_SIZE)),
        part(1, record=altered(digest=DIGEST[:-1] + "1", index=1, size=LARGE, length=BLOCK_SIZE)),
        part(0),
        part(2),
        Done(),
        Ping(),
    ],
)
def test_a_part_of_something_else_is_refused(reply: Any) -> None:
    request = get_shards(first=1, wanted=0b101, size=LARGE, want=2)
    with pytest.raises(PeerMisbehavedError):
        wire.check_answer(request, reply, 0b101)
    assert wire.check_answer(request, part(3), 0b101) == 0b001
    assert wire.check_answer(request, Failed("busy", ""), 0b101) == 0


def test_a_summary_of_the_largest_view_fits_a_frame() -> None:
    everybody = Sync(STATEMENT, bytes(16 * MAX_MEMBERS))
    heads = wire.Heads(wire.REQUESTS)
    heads.feed(wire.encode_head(1, everybody, 0))
    head = heads.next()
    assert head is not None
    assert head.message == everybody


def test_the_fullest_holdings_fit_a_frame() -> None:
    shards = tuple((4, 1, index % 5, bytes(wire.MAX_BITMAP)) for index in range(14))
    assert wire.encode_head(1, HoldingsFound(bytes(wire.MAX_BITMAP), shards), 0)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("lane", ["control", "urgent", "bulk"])
def test_hello(lane: str, plain: bool) -> None:
    heads = wire.Heads(wire.REQUESTS)
    for byte in wire.encode_hello(lane, plain) + encoded(3, Ping()):
        heads.feed(bytes([byte]))
    hello = heads.hello()
    assert hello is not None
    assert (hello.lane, hello.plain) == (lane, plain)
    assert not heads.at_rest
    head = heads.next()
    assert head is not None
    assert head.request_id == 3
    assert heads.at_rest


def test_a_hello_may_have_unknown_fields() -> None:
    heads = wire.Heads(wire.REQUESTS)
    heads.feed(frame(msgpack.packb([b"shoal-bulk", 4, "bulk", True, "later"])))
    assert heads.hello() == wire.Hello(b"shoal-bulk", 4, "bulk", True)


@pytest.mark.parametrize(("theirs", "remedy"), [(3, "upgrade it"), (5, "upgrade this node")])
def test_another_version_is_refused_with_the_remedy(theirs: int, remedy: str) -> None:
    with pytest.raises(NotAdmittedError, match=f"speaks version {theirs} of the bulk channel, .* speaks 4: {remedy}"):
        wire.check_version("bulk channel", theirs, wire.VERSION, PEER)


@pytest.mark.parametrize(
    "hello",
    [
        [b"other-bulk", 4, "bulk"],
        [b"shoal-bulk", 4, "express"],
        ["shoal-bulk", 4, "bulk"],
        [b"shoal-bulk", 4],
        [b"shoal-bulk", 4, "bulk", "x" * 100],
        [b"shoal-bulk", 4, "bulk", 1],
    ],
)
def test_an_invalid_hello_is_refused(hello: list[Any]) -> None:
    heads = wire.Heads(wire.REQUESTS)
    heads.feed(frame(msgpack.packb(hello)))
    with pytest.raises(PeerMisbehavedError):
        heads.hello()
