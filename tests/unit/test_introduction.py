"""The introduction's messages: they decode to the values that were encoded, and malformed ones are refused."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import introduction
from protocol.errors import NotAdmittedError, PeerMisbehavedError
from protocol.ids import PeerId
from protocol.introduction import MAX_INTRODUCED, PREFIX
from protocol.members import MAX_ADDRESSES, Member, Statement
from protocol.records import peer_id_of
from protocol.statements import Author


def peer(number: int) -> PeerId:
    return peer_id_of(number.to_bytes(32, "big"))


def member(number: int, name: str = "edge") -> Member:
    return Member(peer(number), name, "site", ("10.0.0.5:4502", "[fd00::5]:4502"))


def body(frame: bytes, most: int = introduction.MAX_MEMBERS_BYTES) -> bytes:
    assert introduction.body_length(frame[: PREFIX.size], most) == len(frame) - PREFIX.size
    return frame[PREFIX.size :]


def said(about: Member, certificate: bytes = bytes(450)) -> Statement:
    stated = Author(about.peer_id, lambda data: bytes(64), lambda: certificate).state(about, 1)
    return Statement(*msgspec.structs.astuple(stated))


def encoded(*members: object) -> bytes:
    return msgspec.msgpack.encode([said(item) if isinstance(item, Member) else item for item in members])


@given(st.integers(0, 40), st.text(st.characters(categories=["L", "N"]), max_size=20))
def test_members_round_trip(count: int, name: str) -> None:
    statements = tuple(said(member(number, name)) for number in range(count + 1))
    frame = introduction.encode_members(statements)
    assert introduction.decode_members(body(frame), peer(0)) == statements


def test_a_hello_round_trips() -> None:
    frame = introduction.encode_hello(b"certificate")
    assert introduction.decode_hello(body(frame, introduction.MAX_HELLO), peer(0)) == b"certificate"


def test_encoded_messages_keep_the_bounds() -> None:
    many = [member(number) for number in range(MAX_INTRODUCED + 50)]
    small = introduction.decode_members(body(introduction.encode_members([said(m) for m in many])), peer(0))
    assert len(small) == MAX_INTRODUCED
    large = [msgspec.structs.replace(member, addresses=("a" * 262,) * MAX_ADDRESSES) for member in many]
    fat = [said(member, bytes(4096)) for member in large]
    got = introduction.decode_members(body(introduction.encode_members(fat)), peer(0))
    assert 16 <= len(got) < MAX_INTRODUCED


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ((), "names 0 members"),
        (tuple(member(number) for number in range(MAX_INTRODUCED + 1)), "names 65 members"),
        ((member(1),), "introduces itself as"),
        ((Member(PeerId("x"), "n", "s", ()),), "false id"),
        ((member(0), msgspec.structs.replace(member(2), name="n" * 256)), "out of bounds"),
        ((member(0), msgspec.structs.replace(member(2), name="a\nb")), "out of bounds"),
        ((member(0), msgspec.structs.replace(member(2), site="\x1b[2J")), "out of bounds"),
        ((member(0), msgspec.structs.replace(member(2), addresses=("a:1",) * 9)), "out of bounds"),
        ((member(0), msgspec.structs.replace(member(2), addresses=("a" * 263,))), "out of bounds"),
        ((member(0), msgspec.structs.replace(member(2), weight=-1.0)), "out of bounds"),
        ((member(0), msgspec.structs.replace(member(2), weight=float("nan"))), "out of bounds"),
        ((member(0), msgspec.structs.replace(member(2), weight=float("inf"))), "out of bounds"),
        ((1, 2), "cannot be decoded"),
        ((("a", "b"),), "cannot be decoded"),
    ],
)
def test_members_out_of_bounds_are_refused(members: tuple[object, ...], reason: str) -> None:
    with pytest.raises(PeerMisbehavedError, match=reason):
        introduction.decode_members(encoded(*members), peer(0))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_misbehaviour(data: bytes) -> None:
    with pytest.raises(PeerMisbehavedError):
        introduction.decode_members(data, peer(0))
    with contextlib.suppress(PeerMisbehavedError):
        assert isinstance(introduction.decode_hello(data, peer(0)), bytes)


def test_another_version_is_refused_and_later_fields_are_not() -> None:
    for version, remedy in ((1, "upgrade it"), (3, "upgrade this node")):
        with pytest.raises(NotAdmittedError, match=f"speaks version {version} .* speaks 2: {remedy}"):
            introduction.decode_hello(msgspec.msgpack.encode((version, b"c")), peer(0))
    assert introduction.decode_hello(msgspec.msgpack.encode((2, b"c", "later")), peer(0)) == b"c"


def test_a_message_over_the_bound_is_refused_by_its_prefix() -> None:
    assert introduction.body_length(PREFIX.pack(8192), introduction.MAX_HELLO) == 8192
    with pytest.raises(PeerMisbehavedError):
        introduction.body_length(PREFIX.pack(8193), introduction.MAX_HELLO)
