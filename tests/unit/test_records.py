"""A record is its signer's statement about one block, and about nothing else."""

from __future__ import annotations

from hashlib import sha256

import base58
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.errors import BadInputError, PeerMisbehavedError
from protocol.ids import BLOCK_SIZE, BlockId, Digest, ObjectRef, PeerId
from protocol.records import Record, check_record, make_record, peer_id_of, public_key_of

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNER = peer_id_of(KEY.public_key().public_bytes_raw())
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER = peer_id_of(OTHER_KEY.public_key().public_bytes_raw())
REF = ObjectRef(Digest("sha256", "0a" * 32), 2 * BLOCK_SIZE + 5)
TAIL = b"shoal"

ENCODED = (
    "97"
    "d947"
    "7368613235363a" + "3061" * 32 + "02"
    "05"
    "ce00100005"
    "c420"
    "888696c38e895dd742b8494f449219c12a256a16d0841b93813c841a298df92c"
    "d934" + SIGNER.encode().hex() + "c440"
    "3787eaa2354419575c3fac316d2dff37a2fd7d3308911d971b86b4dc6d7d6560"
    "6e338882b02dda91fa4e800ab558edb6669c4fb19665b7ee65ba879d688ec20d"
)
"""docs/FORMATS.md, "Record"."""


@pytest.fixture
def record() -> Record:
    return make_record(REF, 2, sha256(TAIL).digest(), SIGNER, sign=KEY.sign)


def test_a_record_names_its_block(record: Record) -> None:
    check_record(record, REF, 2)
    assert record.object == REF
    assert record.block == BlockId(REF.digest, 2)
    assert (record.length, record.size, record.signer) == (5, REF.size, SIGNER)


def test_a_record_matches_its_bytes_only(record: Record) -> None:
    assert record.matches(TAIL)
    assert record.matches(memoryview(bytearray(TAIL)))
    for wrong in (b"", b"shoaL", b"shoal\0", b"shoa"):
        assert not record.matches(wrong)


def test_the_record_of_the_documentation(record: Record) -> None:
    encoded = msgspec.msgpack.encode(record)
    assert encoded.hex() == ENCODED
    decoded = msgspec.msgpack.decode(encoded, type=Record)
    assert decoded == record
    check_record(decoded, REF, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "sha256:" + "0b" * 32},
        {"digest": "sha512:" + "0a" * 64},
        {"index": 1},
        {"index": -1},
        {"length": 4},
        {"length": BLOCK_SIZE},
        {"size": REF.size + 1},
        {"sha256": sha256(b"Shoal").digest()},
        {"sha256": b""},
        {"sha256": sha256(TAIL).digest() + b"\0"},
        {"signer": OTHER},
        {"signer": PeerId("")},
        {"signer": PeerId("nobody")},
        {"signer": PeerId(SIGNER + "1")},
        {"signature": b""},
        {"signature": bytes(64)},
        {"signature": OTHER_KEY.sign(b"anything")},
    ],
    ids=lambda change: "-".join(change),
)
def test_every_altered_field_is_refused(record: Record, change: dict[str, object]) -> None:
    with pytest.raises(PeerMisbehavedError):
        check_record(msgspec.structs.replace(record, **change), REF, 2)


def test_every_flipped_bit_of_hash_and_signature_is_refused(record: Record) -> None:
    for name in ("sha256", "signature"):
        value = getattr(record, name)
        for bit in range(8 * len(value)):
            flipped = bytearray(value)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(PeerMisbehavedError):
                check_record(msgspec.structs.replace(record, **{name: bytes(flipped)}), REF, 2)


def test_a_record_of_another_block_is_refused(record: Record) -> None:
    for ref, index in (
        (REF, 0),
        (REF, 1),
        (ObjectRef(REF.digest, REF.size + 1), 2),
        (ObjectRef(Digest("sha256", "0b" * 32), REF.size), 2),
    ):
        with pytest.raises(PeerMisbehavedError, match="another block"):
            check_record(record, ref, index)


def test_a_member_cannot_sign_for_another() -> None:
    """S-23"""
    forged = make_record(REF, 2, sha256(TAIL).digest(), SIGNER, sign=OTHER_KEY.sign)
    with pytest.raises(PeerMisbehavedError, match=f"not {SIGNER}'s"):
        check_record(forged, REF, 2)


def test_a_signature_under_another_context_is_refused(record: Record) -> None:
    bare = make_record(
        REF, 2, record.sha256, SIGNER, sign=lambda payload: KEY.sign(payload.removeprefix(b"shoal-record-2\0"))
    )
    with pytest.raises(PeerMisbehavedError):
        check_record(bare, REF, 2)


def test_peer_ids_hold_their_keys() -> None:
    assert SIGNER.startswith("12D3KooW")
    assert public_key_of(SIGNER) == KEY.public_key().public_bytes_raw()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        " " + SIGNER,
        SIGNER + "\n",
        SIGNER[:-1],
        "1" + SIGNER,
        "0OIl",
        "\N{LATIN SMALL LETTER E WITH ACUTE}" * 10,
        "Q" * 65,
        "1" * 10_000_000,
        base58.b58encode(bytes.fromhex("002408021220") + bytes(32)).decode(),
        base58.b58encode(bytes.fromhex("1220") + bytes(32)).decode(),
        base58.b58encode(bytes.fromhex("002408011220") + bytes(33)).decode(),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_other_peer_ids_are_refused(text: str) -> None:
    with pytest.raises(BadInputError, match="not an Ed25519 peer id"):
        public_key_of(PeerId(text))
