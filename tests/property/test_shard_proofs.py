"""Proofs of shards: a wrong shard is its maker's if the maker signed it, and else its sender's. No other is blamed."""

from __future__ import annotations

from hashlib import sha256
from random import Random

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from node.identity.identity import Identity
from protocol.erasure import encode_shard
from protocol.errors import PeerMisbehavedError
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, PeerId, Shard
from protocol.records import make_record
from protocol.shard_proofs import ShardProof, answerable_for, check_proof, make_proof

HONEST, LIAR = (Identity.of(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)) for number in (1, 2))
BLOCK = Random(3).randbytes(1003)
REF = ObjectRef(Digest("sha256", sha256(BLOCK).hexdigest()), len(BLOCK))
RECORD = make_record(REF, 0, sha256(BLOCK).digest(), HONEST.peer_id, sign=HONEST.sign)
SHARD = Shard(4, 1, 2)
RIGHT = bytes(encode_shard(BLOCK, SHARD.k, SHARD.m, SHARD.index))
PROOF = make_proof(RECORD, SHARD, RIGHT, maker=HONEST.peer_id, sign=HONEST.sign)


def test_a_maker_cannot_deny_its_signature() -> None:
    wrong = bytes(len(RIGHT))
    proof = make_proof(RECORD, SHARD, wrong, maker=LIAR.peer_id, sign=LIAR.sign)
    check_proof(proof, RECORD, SHARD, wrong)
    assert answerable_for(HONEST.peer_id, proof, RECORD, SHARD, wrong) == LIAR.peer_id
    assert answerable_for(LIAR.peer_id, None, RECORD, SHARD, wrong) == LIAR.peer_id


@st.composite
def shards(draw: st.DrawFn) -> Shard:
    k = draw(st.integers(1, 8))
    m = draw(st.integers(0, 4))
    return Shard(k, m, draw(st.integers(0, k + m - 1)))


@given(st.data())
def test_no_single_liar_gets_an_honest_member_quarantined(data: st.DataObject) -> None:
    """S-04: whatever the liar sends in place of a shard that an honest member signed, it answers for itself."""
    record = RECORD
    if data.draw(st.booleans(), label="another block"):
        sha = data.draw(st.binary(min_size=32, max_size=32).filter(lambda sha: sha != RECORD.sha256))
        record = make_record(REF, 0, sha, LIAR.peer_id, sign=LIAR.sign)
    shard = data.draw(st.just(SHARD) | shards())
    body = data.draw(st.just(RIGHT) | st.binary(max_size=300))
    signature = bytearray(PROOF.signature)
    if data.draw(st.booleans(), label="another signature"):
        signature[data.draw(st.integers(0, 63))] ^= 1 << data.draw(st.integers(0, 7))
    proof = ShardProof(
        data.draw(st.sampled_from((HONEST.peer_id, LIAR.peer_id))),
        data.draw(st.sampled_from((PROOF.sha256, sha256(body).digest()))),
        bytes(signature),
    )
    if (record, shard, body) == (RECORD, SHARD, RIGHT):
        return  # not wrong
    assert answerable_for(LIAR.peer_id, proof, record, shard, body) == LIAR.peer_id


@given(st.data())
def test_a_proof_that_was_altered_anywhere_is_refused(data: st.DataObject) -> None:
    encoded = bytearray(msgspec.msgpack.encode(PROOF))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        altered = msgspec.msgpack.decode(encoded, type=ShardProof)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return
    if altered != PROOF:
        with pytest.raises(PeerMisbehavedError):
            check_proof(altered, RECORD, SHARD, RIGHT)


def test_the_bytes_that_the_maker_signs_are_those_of_the_specification() -> None:
    """docs/FORMATS.md, "Proof of a shard"."""
    signed: list[bytes] = []
    record = make_record(
        ObjectRef(Digest("sha256", "0a" * 32), 2 * BLOCK_SIZE + 5),
        2,
        sha256(b"shoal").digest(),
        PeerId("unused"),
        sign=lambda payload: bytes(64),
    )

    def note(payload: bytes) -> bytes:
        signed.append(payload)
        return bytes(64)

    make_proof(record, SHARD, b"oa", maker=LIAR.peer_id, sign=note)
    digest, block, sha = b"sha256:" + b"0a" * 32, sha256(b"shoal").digest(), sha256(b"oa").digest()
    assert signed == [
        b"shoal-shard-1\0\x98" + b"\xd9\x47" + digest + b"\x02\xce\x00\x10\x00\x05\xc4\x20" + block
        + b"\x04\x01\x02\xc4\x20" + sha
    ]  # fmt: skip
