"""Join tokens and revocations: those that were made are accepted, and any altered one is refused."""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from protocol import admission
from protocol.admission import (
    MAX_REVOCATIONS,
    MAX_SITE,
    MAX_TIME,
    MAX_USES,
    MIN_LIFETIME_S,
    Revocation,
    Token,
    check_revocation,
    check_token,
    cluster_id,
    make_revocation,
    make_token,
    read_revocation,
    read_token,
    revocation_text,
)
from protocol.errors import BadInputError, NotAdmittedError
from protocol.ids import PeerId
from protocol.members import MAX_ADDRESSES, Member
from protocol.messages import SyncReply
from protocol.records import peer_id_of
from protocol.statements import Author
from protocol.summary import MAX_STATEMENTS
from protocol.wire import MAX_ADDRESS, MAX_CERTIFICATE, MAX_HEADER, MAX_NAME, encode_head

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([byte]) * 32) for byte in (1, 2))
CLUSTER = cluster_id(b"certificate")
SITES = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=MAX_SITE)
TOKENS = st.builds(
    lambda made, lasts, **fields: Token(cluster=CLUSTER, made=made, expires=made + lasts, **fields),
    made=st.integers(0, 1 << 39),
    lasts=st.integers(1, 1 << 38),
    site=SITES,
    uses=st.integers(0, MAX_USES),
    lifetime=st.just(0) | st.integers(MIN_LIFETIME_S, MAX_TIME),
    id=st.binary(min_size=16, max_size=16),
)
PEERS = st.binary(min_size=32, max_size=32).map(peer_id_of)
SUBJECTS = PEERS | st.binary(min_size=16, max_size=16).map(lambda id_: "token:" + id_.hex())


def token_with(**fields: Any) -> Token:
    good = Token(cluster=CLUSTER, site="s", made=0, expires=1, uses=0, lifetime=0, id=bytes(16))
    return msgspec.structs.replace(good, **fields)


def accepted(text: str, now: float = 0.0) -> Token:
    return check_token(text, KEY.public_key(), CLUSTER, now)


@given(TOKENS)
def test_a_token_round_trips(token: Token) -> None:
    text = make_token(token, KEY.sign)
    assert read_token(text) == accepted(text) == accepted(text, token.expires) == token
    assert len(text) <= 500
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")
    with pytest.raises(NotAdmittedError, match="expired"):
        accepted(text, token.expires + 1)


@given(TOKENS, st.data())
def test_a_token_that_was_altered_anywhere_is_refused(token: Token, data: st.DataObject) -> None:
    text = make_token(token, KEY.sign)
    assert_refused(altered(text, data))


def altered(text: str, data: st.DataObject) -> str:
    """The text with a character changed, added or removed, or only a piece of the text."""
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(codec="latin-1"))
    changed = data.draw(
        st.sampled_from([text[:at] + other + text[at + 1 :], text[:at] + other + text[at:], text[:at], text[at + 1 :]])
    )
    return changed if changed != text else text + "A"


def assert_refused(text: str) -> None:
    with pytest.raises(NotAdmittedError) as caught:
        accepted(text)
    secret = text[20:]
    assert len(secret) < 12 or secret not in str(caught.value), "an error must not hold the secret"


@given(st.text(max_size=1200))
def test_any_text_is_refused(text: str) -> None:
    for candidate in (text, admission.TOKEN_PREFIX + text):
        assert_refused(candidate)
        with pytest.raises(BadInputError):
            read_revocation(candidate)


@given(TOKENS)
def test_a_token_of_another_authority_is_refused(token: Token) -> None:
    with pytest.raises(NotAdmittedError, match="another cluster"):
        accepted(make_token(token, OTHER.sign))
    with pytest.raises(NotAdmittedError, match="another cluster"):
        check_token(make_token(token, KEY.sign), KEY.public_key(), cluster_id(b"other"), 0)


@pytest.mark.parametrize(
    "token",
    [
        token_with(cluster=b"short"),
        token_with(site=""),
        token_with(site="s" * (MAX_SITE + 1)),
        token_with(site="a\nb"),
        token_with(made=-1),
        token_with(made=5, expires=5),
        token_with(expires=MAX_TIME + 1),
        token_with(uses=MAX_USES + 1),
        token_with(uses=-1),
        token_with(lifetime=MIN_LIFETIME_S - 1),
        token_with(id=bytes(15)),
    ],
)
def test_values_out_of_bounds_are_neither_made_nor_accepted(token: Token) -> None:
    with pytest.raises(BadInputError, match="out of bounds"):
        make_token(token, KEY.sign)
    body = msgspec.msgpack.encode(token)
    signed = base64.urlsafe_b64encode(body + KEY.sign(b"shoal-token-1\x00" + body))
    assert_refused(admission.TOKEN_PREFIX + signed.rstrip(b"=").decode())


@given(SUBJECTS, st.integers(0, MAX_TIME))
def test_a_revocation_round_trips(subject: str, made: int) -> None:
    revocation = make_revocation(CLUSTER, subject, made, KEY.sign)
    check_revocation(revocation, KEY.public_key(), CLUSTER)
    assert read_revocation(revocation_text(revocation)) == revocation
    for key, cluster in ((OTHER.public_key(), CLUSTER), (KEY.public_key(), cluster_id(b"other"))):
        with pytest.raises(BadInputError, match="not signed"):
            check_revocation(revocation, key, cluster)


@given(SUBJECTS, SUBJECTS, st.integers(0, 1 << 33), st.data())
def test_a_revocation_that_was_altered_anywhere_is_refused(
    subject: str, other: str, made: int, data: st.DataObject
) -> None:
    revocation = make_revocation(CLUSTER, subject, made, KEY.sign)
    text = altered(revocation_text(revocation), data)
    with pytest.raises(BadInputError):
        check_revocation(read_revocation(text), KEY.public_key(), CLUSTER)
    for lie in (Revocation(other, made, revocation.signature), Revocation(subject, made + 1, revocation.signature)):
        if lie != revocation:
            with pytest.raises(BadInputError):
                check_revocation(lie, KEY.public_key(), CLUSTER)


@pytest.mark.parametrize("subject", ["", "12D3KooW", "token:", "token:" + "G" * 32, "token:" + "a" * 31, "x" * 60])
def test_only_peers_and_tokens_can_be_revoked(subject: str) -> None:
    with pytest.raises(BadInputError):
        make_revocation(CLUSTER, subject, 0, KEY.sign)


def test_a_token_is_revoked_by_its_name() -> None:
    token = token_with(id=bytes(range(16)))
    assert token.subject == "token:000102030405060708090a0b0c0d0e0f"
    check_revocation(make_revocation(CLUSTER, token.subject, 0, KEY.sign), KEY.public_key(), CLUSTER)


def test_all_revocations_and_the_largest_statements_fit_one_message() -> None:
    texts = {"name": "n" * MAX_NAME, "site": "s" * MAX_NAME, "addresses": ("a" * MAX_ADDRESS,) * MAX_ADDRESSES}
    member = Member(PeerId("p" * 64), **texts)
    statement = Author(member.peer_id, lambda data: bytes(64), lambda: bytes(MAX_CERTIFICATE)).state(member, 1)
    most = Revocation("x" * admission.MAX_SUBJECT, MAX_TIME, bytes(64))
    reply = SyncReply((statement,) * MAX_STATEMENTS, revocations=(most,) * MAX_REVOCATIONS)
    assert len(encode_head(1, reply, 0)) < MAX_HEADER
