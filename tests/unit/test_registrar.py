"""Joins without a network: which nodes get a certificate, and which members see a token."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from node.identity import registrar
from node.identity.certificates import (
    ENDLESS,
    Authority,
    Subject,
    Validity,
    create_authority,
    issue,
    issued_by,
    load_authority,
    subject_of,
    validity_of,
)
from node.identity.identity import Identity
from node.identity.registrar import MAX_TOKENS, MOST_WRONG, WRONG_S, Registrar, Uses, apply
from protocol import join
from protocol.admission import Token, make_token
from protocol.errors import BadInputError, DeniedError, NotAdmittedError, PeerMisbehavedError, PeerUnavailableError
from protocol.ids import PeerId
from protocol.introduction import PREFIX, body_length
from protocol.messages import Failed, Renew, Renewed

NOW = 1_800_000_000
DAY = 86400
HOST = "10.0.0.9"


def identity() -> Identity:
    return Identity.of(Ed25519PrivateKey.generate())


MEMBER, NODE = identity(), identity()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    path = tmp_path_factory.mktemp("authority") / "key"
    create_authority(path)
    return load_authority(path)


class MemoryLine:
    """One end of a stream with `peer`. `sent` holds the messages from this end."""

    def __init__(
        self, peer: PeerId, out: trio.MemorySendChannel[bytes], into: trio.MemoryReceiveChannel[bytes]
    ) -> None:
        self.peer = peer
        self.sent: list[bytes] = []
        self._out, self._into = out, into

    async def send(self, message: bytes) -> None:
        self.sent.append(message)
        await self._out.send(message)

    async def receive(self, most: int) -> bytes:
        try:
            message = await self._into.receive()
        except trio.EndOfChannel as error:
            raise PeerUnavailableError("closed") from error
        return message[PREFIX.size : PREFIX.size + body_length(message[: PREFIX.size], most)]

    def close(self) -> None:
        self._out.close()


def lines() -> tuple[MemoryLine, MemoryLine]:
    """The new node's end, and the member's."""
    to_member, at_member = trio.open_memory_channel[bytes](4)
    to_node, at_node = trio.open_memory_channel[bytes](4)
    return MemoryLine(MEMBER.peer_id, to_member, at_node), MemoryLine(NODE.peer_id, to_node, at_member)


class Desk:
    """A member that issues certificates, and its clock."""

    def __init__(self, authority: Authority | None, folder: Path) -> None:
        self.now = float(NOW)
        self.revoked: set[str] = set()
        self.folder = folder
        self.registrar = Registrar(authority, self.revoked, Uses(folder / registrar.FILE_NAME), lambda: self.now)

    async def join(
        self, text: str, *, peer: PeerId = NODE.peer_id, host: str = HOST, name: str = "edge-1"
    ) -> tuple[bytes, bytes]:
        ours, theirs = lines()
        theirs.peer = peer

        async def serve() -> None:
            with closing_its_end(theirs):
                await self.registrar.serve(theirs, host, MEMBER.peer_id)

        return await both(serve, lambda: apply(ours, peer, text, name))


class closing_its_end:  # reads as a statement
    """Close the end of a side when the side returns or raises. Errors of its peer are dropped."""

    def __init__(self, line: MemoryLine) -> None:
        self._line = line

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self._line.close()
        return isinstance(error, (PeerMisbehavedError, PeerUnavailableError))


async def both(serve: Callable[[], Awaitable[None]], ask: Callable[[], Awaitable[tuple[bytes, bytes]]]):  # type: ignore[no-untyped-def]
    failure: Exception | None = None
    answer: tuple[bytes, bytes] | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        try:
            answer = await ask()
        except Exception as error:  # noqa: BLE001 # raised below, out of the nursery's group
            failure = error
            nursery.cancel_scope.cancel()
    if failure:
        raise failure
    return answer


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def wrapped() -> None:
        await main()

    trio.run(wrapped, clock=MockClock(autojump_threshold=0))


def token(authority: Authority, **changes: object) -> str:
    usual = msgspec.structs.replace(plain_token(authority.cluster), made=NOW)
    return make_token(msgspec.structs.replace(usual, **changes), authority.key.sign)


def plain_token(cluster: bytes) -> Token:
    return Token(cluster, "harbour", made=0, expires=NOW + DAY, uses=0, lifetime=0, id=bytes(16))


def test_a_token_brings_a_certificate(authority: Authority, tmp_path: Path) -> None:
    async def main() -> None:
        desk = Desk(authority, tmp_path)
        certificate, ca = await desk.join(token(authority))
        assert ca == authority.der
        assert issued_by(certificate, ca) == NODE.peer_id
        assert subject_of(certificate) == Subject(NODE.peer_id, "edge-1", "harbour")
        assert validity_of(certificate) == ENDLESS

    run(main)


@pytest.mark.parametrize(("hours", "start"), [(0, NOW), (7, NOW + 7 * 3600), (-7, NOW), (-24 * 365 * 50, NOW)])
def test_a_lifetime_runs_from_the_later_of_both_clocks(
    authority: Authority, tmp_path: Path, hours: int, start: int
) -> None:
    async def main() -> None:
        desk = Desk(authority, tmp_path)
        desk.now += hours * 3600
        certificate, _ = await desk.join(token(authority, lifetime=90 * DAY))
        assert validity_of(certificate) == Validity(start, start + 90 * DAY)

    run(main)


def test_the_error_of_a_token_is_answered_and_logged(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        desk = Desk(authority, tmp_path)
        used = token(authority, id=b"u" * 16)
        desk.revoked.add("token:" + b"r".hex() * 16)
        forged = make_token(plain_token(authority.cluster), MEMBER.sign)
        for text, why in (
            (token(authority, made=0, expires=NOW - 1), "expired at 2027-01-15"),
            (forged, "altered"),
            (token(authority, id=b"r" * 16), "token is revoked"),
        ):
            with pytest.raises(NotAdmittedError, match=why):
                await desk.join(text)
            assert why in caplog.records[-1].getMessage()
            assert NODE.peer_id in caplog.records[-1].getMessage()
            assert HOST in caplog.records[-1].getMessage()
        desk.revoked.add(NODE.peer_id)
        with pytest.raises(NotAdmittedError, match="needs a new identity"):
            await desk.join(used)
        assert all(text[20:] not in caplog.text for text in (forged, used))

    caplog.set_level(logging.DEBUG)
    run(main)


def test_a_member_without_the_key_explains_what_to_do(authority: Authority, tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(NotAdmittedError, match="give the address of a member whose"):
            await Desk(None, tmp_path).join(token(authority))

    run(main)


def test_after_wrong_tokens_a_host_is_refused_for_a_minute(authority: Authority, tmp_path: Path) -> None:
    async def main() -> None:
        desk = Desk(authority, tmp_path)
        wrong = token(authority, made=0, expires=1)
        for _ in range(MOST_WRONG):
            with pytest.raises(NotAdmittedError, match="expired"):
                await desk.join(wrong)
        with pytest.raises(NotAdmittedError, match="too many"):
            await desk.join(token(authority))
        await desk.join(token(authority), host="10.0.0.10")
        await trio.sleep(WRONG_S + 1)
        await desk.join(token(authority))

    run(main)


def test_a_number_of_uses_is_kept_across_restarts(authority: Authority, tmp_path: Path) -> None:
    async def main() -> None:
        twice = token(authority, uses=2)
        first, second, third = (identity().peer_id for _ in range(3))
        for peer in (first, second, first):
            await Desk(authority, tmp_path).join(twice, peer=peer)
        desk = Desk(authority, tmp_path)
        with pytest.raises(NotAdmittedError, match="has admitted 2 nodes"):
            await desk.join(twice, peer=third)
        await desk.join(token(authority, uses=2, id=b"x" * 16), peer=third)

    run(main)


def test_uses_are_bounded_and_forgotten_with_their_tokens(authority: Authority, tmp_path: Path) -> None:
    uses = Uses(tmp_path / "uses")

    def numbered(number: int) -> Token:
        return msgspec.structs.replace(plain_token(authority.cluster), expires=NOW, uses=1, id=number.to_bytes(16))

    for number in range(MAX_TOKENS):
        uses.take(numbered(number), NODE.peer_id, 0)
    with pytest.raises(NotAdmittedError, match="too many join tokens"):
        uses.take(numbered(MAX_TOKENS), NODE.peer_id, 0)
    uses.take(numbered(MAX_TOKENS), NODE.peer_id, NOW + 1)
    (tmp_path / "uses").write_bytes(b"damaged")
    with pytest.raises(BadInputError, match="remove it"):
        Uses(tmp_path / "uses")


def test_a_use_that_cannot_be_stored_admits_no_node(authority: Authority, tmp_path: Path) -> None:
    async def main() -> None:
        desk = Desk(authority, tmp_path / "gone")
        for _ in range(MOST_WRONG + 1):
            with pytest.raises(NotAdmittedError, match="its disk cannot be written"):
                await desk.join(token(authority, uses=2), peer=identity().peer_id)
        await desk.join(token(authority))

    run(main)


# The new node's side


def offer_of(authority: Authority, signer: Callable[[bytes], bytes], *, to: PeerId = NODE.peer_id):  # type: ignore[no-untyped-def]
    """A member that offers, with `signer` instead of the authority's key, and records the message after the offer."""

    async def serve(line: MemoryLine, received: list[bytes]) -> None:
        knock = join.decode_as(join.Knock, await line.receive(join.MAX_MESSAGE))
        proof = signer(join.proven(knock.nonce, to, MEMBER.peer_id))
        await line.send(join.encode(join.Offer(join.VERSION, authority.der, proof)))
        received.append(await line.receive(join.MAX_MESSAGE))

    return serve


@pytest.mark.parametrize(
    ("case", "why"),
    [("another cluster", "of the cluster"), ("no key", "does not hold"), ("replayed", "does not hold")],
)
def test_a_token_is_shown_only_to_a_member_with_the_key(
    authority: Authority, tmp_path: Path, case: str, why: str
) -> None:
    create_authority(tmp_path / "other")
    other = load_authority(tmp_path / "other")
    serve = {
        "another cluster": offer_of(other, other.key.sign),
        "no key": offer_of(authority, MEMBER.sign),
        "replayed": offer_of(authority, authority.key.sign, to=identity().peer_id),
    }[case]
    received: list[bytes] = []

    async def main() -> None:
        ours, theirs = lines()
        with pytest.raises(NotAdmittedError, match=why):
            await both(lambda: serve(theirs, received), lambda: apply(ours, NODE.peer_id, token(authority), "n"))

    run(main)
    assert not received


def test_a_certificate_for_another_node_is_refused(authority: Authority) -> None:
    async def main() -> None:
        ours, theirs = lines()

        async def serve() -> None:
            received: list[bytes] = []
            await offer_of(authority, authority.key.sign)(theirs, received)
            der = issue(authority, Subject(MEMBER.peer_id))
            await theirs.send(join.encode(join.Admittance(der)))

        with pytest.raises(PeerMisbehavedError, match="for another node"):
            await both(serve, lambda: apply(ours, NODE.peer_id, token(authority), "n"))

    run(main)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_misbehaviour(data: bytes) -> None:
    for kind in (join.Knock, join.Offer, join.Application, join.Admittance):
        try:
            join.decode_as(kind, data)
        except PeerMisbehavedError:
            continue


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (join.Knock, [2, bytes(32)]),
        (join.Knock, [1, bytes(31)]),
        (join.Offer, [2, b"", b"", ""]),
        (join.Offer, [1, b"", b"", "\x1b[2J"]),
        (join.Offer, [1, b"", b"", "x" * 501]),
        (join.Application, ["t", "n" * 256]),
        (join.Application, ["t", "a\nb"]),
        (join.Admittance, [b"", "\n"]),
    ],
)
def test_messages_out_of_bounds_are_misbehaviour(kind: type[join.Knock], fields: list[object]) -> None:
    with pytest.raises(PeerMisbehavedError):
        join.decode_as(kind, msgspec.msgpack.encode(fields))


# Renewal


def test_a_renewed_certificate_has_the_same_subject_and_lifetime(authority: Authority, tmp_path: Path) -> None:
    async def main() -> None:
        desk = Desk(authority, tmp_path)
        subject = Subject(NODE.peer_id, "edge-1", "harbour")
        old = issue(authority, subject, Validity(NOW - 80 * DAY, NOW + 10 * DAY))
        answer = (await desk.registrar.handle(NODE.peer_id, Renew(old))).message
        assert isinstance(answer, Renewed)
        assert subject_of(answer.certificate) == subject
        assert validity_of(answer.certificate) == Validity(NOW, NOW + 90 * DAY)
        desk.now = 0  # its clock stands in 1970
        answer = (await desk.registrar.handle(NODE.peer_id, Renew(old))).message
        assert isinstance(answer, Renewed)
        assert validity_of(answer.certificate).end == NOW + 10 * DAY
        with pytest.raises(DeniedError):
            await desk.registrar.handle(MEMBER.peer_id, Renew(old))
        stranger = Authority(MEMBER.private_key, authority.certificate)
        forged = issue(stranger, subject)
        with pytest.raises(NotAdmittedError):
            await desk.registrar.handle(NODE.peer_id, Renew(forged))
        answer = (await Desk(None, tmp_path).registrar.handle(NODE.peer_id, Renew(old))).message
        assert isinstance(answer, Failed)
        assert answer.code == "not-held"

    run(main)
