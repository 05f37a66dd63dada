"""The introduction's messages: they decode to the values that were encoded, and malformed ones are refused."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import introduction
from protocol.errors import PeerMisbehavedError
from protocol.ids import PeerId
from protocol.introduction import PREFIX
from protocol.members import MAX_ADDRESSES, Member
from protocol.records import peer_id_of


def peer(number: int) -> PeerId:
    return peer_id_of(number.to_bytes(32, "big"))


def member(number: int, name: str = "edge") -> Member:
    return Member(peer(number), name, "site", ("10.0.0.5:4502", "[fd00::5]:4502"))


def body(frame: bytes, most: int = introduction.MAX_MEMBERS_BYTES) -> bytes:
    assert introduction.body_length(frame[: PREFIX.size], most) == len(frame) - PREFIX.size
    return frame[PREFIX.size :]


def encoded(*members: object) -> bytes:
    return msgspec.msgpack.encode(members)


@given(st.integers(0, 40), st.text(st.characters(categories=["L", "N"]), max_size=20))
def test_members_round_trip(count: int, name: str) -> None:
    others = [member(number + 1, name) for number in range(count)]
    frame = introduction.encode_members(member(0, name), others)
    assert introduction.decode_members(body(frame), peer(0)) == (member(0, name), *others)


def test_a_hello_round_trips() -> None:
    frame = introduction.encode_hello(b"certificate")
    assert introduction.decode_hello(body(frame, introduction.MAX_HELLO)) == b"certificate"


def test_the_sender_is_named_once_and_first() -> None:
    frame = introduction.encode_members(member(1), [member(0), member(1), member(2)])
    assert introduction.decode_members(body(frame), peer(1)) == (member(1), member(0), member(2))


def test_encoded_messages_keep_the_bounds() -> None:
    many = [member(number) for number in range(introduction.MAX_INTRODUCED + 50)]
    assert len(introduction.decode_members(body(introduction.encode_members(many[0], many)), peer(0))) == 1024
    large = [msgspec.structs.replace(member, addresses=("a" * 262,) * MAX_ADDRESSES) for member in many]
    got = introduction.decode_members(body(introduction.encode_members(large[0], large)), peer(0))
    assert 100 < len(got) < introduction.MAX_INTRODUCED


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ((), "names 0 members"),
        (tuple(member(number) for number in range(1025)), "names 1025 members"),
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
        assert isinstance(introduction.decode_hello(data), bytes)


def test_another_version_is_refused_and_later_fields_are_not() -> None:
    with pytest.raises(PeerMisbehavedError, match="version 2"):
        introduction.decode_hello(msgspec.msgpack.encode((2, b"c")))
    assert introduction.decode_hello(msgspec.msgpack.encode((1, b"c", "later"))) == b"c"


def test_a_message_over_the_bound_is_refused_by_its_prefix() -> None:
    assert introduction.body_length(PREFIX.pack(8192), introduction.MAX_HELLO) == 8192
    with pytest.raises(PeerMisbehavedError):
        introduction.body_length(PREFIX.pack(8193), introduction.MAX_HELLO)
