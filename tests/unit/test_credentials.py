"""A node's certificate and its renewal, the verification of other certificates, revocations, and their files."""

from __future__ import annotations

import logging
import stat
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from random import Random

import msgspec
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from trio.testing import MockClock

from node.config.schema import ClusterPart, Config, NodePart
from node.exchange.contract import Answer, Heard, Into, Lane
from node.identity import credentials
from node.identity.certificates import (
    ENDLESS,
    Authority,
    Credentials,
    Subject,
    Validity,
    create_authority,
    issue,
    load_authority,
    open_authority,
    validity_of,
)
from node.identity.credentials import Joined, enroll, load_joined, save_joined
from node.identity.identity import Identity
from node.identity.revocations import Revocations
from node.identity.verifier import LEEWAY_S, LOOK_EVERY_S, Verifier
from node.membership.renewal import LOOK_EVERY_S as RENEWAL_EVERY_S
from node.membership.renewal import Renewal
from node.runtime.refusals import SILENCE_S, Refusals
from protocol.admission import MAX_REVOCATIONS, make_revocation
from protocol.errors import BadInputError, NotAdmittedError, PeerMisbehavedError, PeerUnavailableError
from protocol.ids import PeerId
from protocol.members import Member
from protocol.messages import Failed, Renew, Renewed, Reply, Request

NOW, DAY = 1_800_000_000, 86400


def identity() -> Identity:
    return Identity.of(Ed25519PrivateKey.generate())


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    path = tmp_path_factory.mktemp("authority") / "key"
    create_authority(path)
    return load_authority(path)


def certificate(authority: Authority, subject: Identity, validity: Validity = ENDLESS) -> bytes:
    return issue(authority, Subject(subject.peer_id, "edge-1", "harbour"), validity)


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def wrapped() -> None:
        await main()

    trio.run(wrapped, clock=MockClock(autojump_threshold=0))


# Time


@pytest.mark.parametrize(
    ("validity", "now", "good"),
    [
        (Validity(NOW - DAY, NOW), NOW + LEEWAY_S, True),
        (Validity(NOW - DAY, NOW), NOW + LEEWAY_S + 1, False),
        (Validity(NOW, NOW + DAY), NOW - 7 * 3600, True),
        (Validity(NOW, NOW + DAY), 0, True),
        (ENDLESS, 1 << 36, True),
        (ENDLESS, 0, True),
    ],
    ids=["within the leeway", "after it", "not begun", "clock in 1970", "far future", "endless in 1970"],
)
def test_certificates_are_judged_by_their_end_alone(
    authority: Authority, validity: Validity, now: int, good: bool
) -> None:
    verifier = Verifier(Credentials.issued(authority, identity(), "a"), now=lambda: now)
    peer = identity()
    if good:
        assert verifier.verify(certificate(authority, peer, validity)) == peer.peer_id
    else:
        with pytest.raises(NotAdmittedError, match="expired at 2027-01-15"):
            verifier.verify(certificate(authority, peer, validity))


def test_a_connected_peer_is_disconnected_when_its_certificate_expires(authority: Authority) -> None:
    async def main() -> None:
        verifier = Verifier(Credentials.issued(authority, identity(), "a"), now=lambda: NOW + trio.current_time())
        ending, lasting, renewed = identity(), identity(), identity()
        for peer, validity in (
            (ending, Validity(NOW - DAY, NOW + 600 - LEEWAY_S)),
            (lasting, ENDLESS),
            (renewed, Validity(NOW - DAY, NOW + 600 - LEEWAY_S)),
            (renewed, Validity(NOW, NOW + DAY)),
        ):
            verifier.peer_of(certificate(authority, peer, validity))
        gone: list[tuple[PeerId, float]] = []
        async with trio.open_nursery() as nursery:
            await nursery.start(verifier.watch, lambda peer: gone.append((peer, trio.current_time())))
            await trio.sleep(3600)
            nursery.cancel_scope.cancel()
        assert [peer for peer, _ in gone] == [ending.peer_id]
        assert 600 <= gone[0][1] <= 600 + 2 * LOOK_EVERY_S

    run(main)


def test_a_repeated_refusal_is_logged_as_warning_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        refusals = Refusals()
        for _ in range(3):
            refusals.tell("bulk", "peer", "10.0.0.9:1", "expired")
        refusals.tell("introduction", "peer", "10.0.0.9:1", "expired")
        refusals.tell("bulk", "peer", "10.0.0.9:1", "revoked")
        refusals.tell("bulk", "other", "10.0.0.9:1", "expired")
        assert len(warnings()) == 4
        for _ in range(100):
            await trio.sleep(3 * SILENCE_S / 100 + 0.01)
            refusals.tell("bulk", "peer", "10.0.0.9:2", "expired")
        assert len(warnings()) == 6, "also for a peer that tries again all the time"

    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    run(main)


# Renewal


class Members:
    """An exchange and a view of a site whose members answer with the replies of a test."""

    def __init__(self, answers: Mapping[PeerId, Callable[[bytes], Reply | None]]) -> None:
        self.answers = answers
        self.asked: list[PeerId] = []

    @property
    def site(self) -> tuple[Member, ...]:
        return tuple(Member(peer, "n", "s", ()) for peer in self.answers)

    async def request(
        self, peer: PeerId, message: Request, *, lane: Lane, silence_s: float, heard: Heard = None, into: Into = None
    ) -> Answer:
        assert isinstance(message, Renew)
        self.asked.append(peer)
        await trio.lowlevel.checkpoint()
        reply = self.answers[peer](message.certificate)
        if reply is None:
            raise PeerUnavailableError("silent")
        return Answer(reply)


def test_a_certificate_is_renewed_in_its_last_third_by_a_member_with_the_key(authority: Authority) -> None:
    own, first, second, liar = (identity() for _ in range(4))
    begun = certificate(authority, own, Validity(NOW, NOW + 90 * DAY))
    later = certificate(authority, own, Validity(NOW + 60 * DAY, NOW + 150 * DAY))
    saved: list[Joined] = []
    used: list[bytes] = []
    up = False

    async def main() -> None:
        nonlocal up
        verifier = Verifier(Credentials(own, begun, authority.der), now=now)
        joined = Joined(
            certificate=begun, authority=authority.der, bootstrap=(f"/ip4/10.0.0.1/tcp/4501/p2p/{first.peer_id}",)
        )
        members = Members(
            {
                first.peer_id: lambda _: None,
                second.peer_id: lambda _: Renewed(later) if up else Failed("not-held", "no key"),
                liar.peer_id: lambda _: Renewed(certificate(authority, liar)),
                own.peer_id: lambda _: Renewed(later),
            }
        )
        renewal = Renewal(
            verifier,
            joined,
            members,  # type: ignore[arg-type]
            members,  # type: ignore[arg-type]
            save=saved.append,
            renewed=lambda: used.append(verifier.credentials.certificate),
            rng=Random(1),
            now=now,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(renewal.run)
            await trio.sleep(60 * DAY - 2)
            assert not members.asked
            await trio.sleep(DAY)
            assert set(members.asked) == {first.peer_id, second.peer_id, liar.peer_id}
            assert members.asked[0] == first.peer_id
            assert len(members.asked) < 3 * DAY / RENEWAL_EVERY_S * 2
            assert not saved
            up = True
            await trio.sleep(2 * RENEWAL_EVERY_S)
            nursery.cancel_scope.cancel()
        assert verifier.credentials.certificate == later
        assert used == [later]
        assert saved == [msgspec.structs.replace(joined, certificate=later)]

    def now() -> float:
        return NOW + trio.current_time()

    run(main)


def test_a_certificate_without_end_is_never_renewed(authority: Authority) -> None:
    async def main() -> None:
        own = identity()
        der = certificate(authority, own)
        members = Members({})
        joined = Joined(certificate=der, authority=authority.der)
        verifier = Verifier(Credentials(own, der, authority.der))
        await Renewal(verifier, joined, members, members, save=print, renewed=print, rng=Random(1)).run()  # type: ignore[arg-type]
        assert not members.asked

    run(main)


# Files


def config(folder: Path, *, key: str = "", site: str = "default", open_: bool = False) -> Config:
    node = NodePart(name="edge-1", site=site, data_dir=str(folder))
    return Config(node=node, cluster=ClusterPart(key=key, open=open_))


def test_a_node_enrolls_by_a_key_by_a_join_or_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    me, key, other = identity(), tmp_path / "key", tmp_path / "other"
    for path in (key, other):
        create_authority(path)
    cluster = load_authority(key)

    alone = enroll(config(tmp_path, site="s"), tmp_path, me)
    assert alone.authority is not None
    assert (alone.site, alone.joined) == ("s", None)
    assert (tmp_path / "cluster.pem").exists()

    save_joined(tmp_path, Joined(certificate=certificate(cluster, me), authority=cluster.der, bootstrap=("/ip4/...",)))
    assert stat.S_IMODE((tmp_path / credentials.FILE_NAME).stat().st_mode) == 0o644
    joined = enroll(config(tmp_path), tmp_path, me)
    assert joined.authority is None
    assert (joined.site, joined.bootstrap) == ("harbour", ("/ip4/...",))
    assert joined.credentials.authority == cluster.der
    assert enroll(config(tmp_path, site="harbour"), tmp_path, me).site == "harbour"
    with pytest.raises(BadInputError, match=r'node\.site = "elsewhere"'):
        enroll(config(tmp_path, site="elsewhere"), tmp_path, me)

    keyed = enroll(config(tmp_path, key=str(key), site="elsewhere"), tmp_path, me)
    assert keyed.authority is not None
    assert keyed.authority.der == cluster.der
    assert keyed.site == "elsewhere"
    with pytest.raises(BadInputError, match="remove one of them"):
        enroll(config(tmp_path, key=str(other)), tmp_path, me)
    with pytest.raises(BadInputError, match="remove one of them"):
        enroll(config(tmp_path, open_=True), tmp_path, me)
    (tmp_path / credentials.FILE_NAME).unlink()
    caplog.clear()
    free = enroll(config(tmp_path, open_=True), tmp_path, me)
    assert free.credentials.authority == open_authority().der
    assert "is a member, can read its cache" in caplog.text


def test_a_joined_file_of_another_node_stops_the_start(authority: Authority, tmp_path: Path) -> None:
    me, path = identity(), tmp_path / credentials.FILE_NAME
    assert load_joined(tmp_path, me) is None
    good = Joined(certificate=certificate(authority, me), authority=authority.der)
    save_joined(tmp_path, good)
    assert load_joined(tmp_path, me) == good
    with pytest.raises(BadInputError, match="is for"):
        load_joined(tmp_path, identity())
    wrong = (
        msgspec.structs.replace(good, authority=b"x"),
        msgspec.structs.replace(good, authority=good.certificate),
        msgspec.structs.replace(good, certificate=authority.der),
        msgspec.structs.replace(good, authority=open_authority().der),
        {"version": 2},
    )
    for damaged in (b"", b"{}", b"\xff", *map(msgspec.json.encode, wrong)):
        path.write_bytes(damaged)
        with pytest.raises(BadInputError, match="join again"):
            load_joined(tmp_path, me)


def test_revocations_are_kept_and_checked_again(authority: Authority, tmp_path: Path) -> None:
    path, gone = tmp_path / "revocations", identity().peer_id

    def revoke(subject: str, by: Authority = authority) -> list[str]:
        return held.add([make_revocation(by.cluster, subject, NOW, by.key.sign)])

    held = Revocations(path, authority.der)
    assert revoke(gone) == [gone]
    assert revoke(gone) == []
    token = "token:" + "ab" * 16
    assert revoke(token) == [token]
    with pytest.raises(PeerMisbehavedError, match="not signed"):
        revoke(identity().peer_id, open_authority())
    again = Revocations(path, authority.der)
    assert gone in again
    assert token in again
    assert again.all == held.all
    assert gone not in Revocations(path, open_authority().der)
    path.write_bytes(b"damaged")
    assert Revocations(path, authority.der).all == ()


def test_revocations_are_bounded(authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = Revocations(tmp_path / "revocations", authority.der)
    many = [
        make_revocation(authority.cluster, "token:" + number.to_bytes(16).hex(), NOW, authority.key.sign)
        for number in range(MAX_REVOCATIONS + 1)
    ]
    assert len(held.add(many)) == MAX_REVOCATIONS
    assert many[-1].subject not in held
    assert "needs a new key" in caplog.text
    assert len(Revocations(tmp_path / "revocations", authority.der).all) == MAX_REVOCATIONS


def test_revocations_count_even_if_the_disk_cannot_be_written(authority: Authority, tmp_path: Path) -> None:
    held = Revocations(tmp_path / "none" / "revocations", authority.der)
    gone = identity().peer_id
    assert held.add([make_revocation(authority.cluster, gone, NOW, authority.key.sign)]) == [gone]
    assert gone in held


def test_a_renewed_certificate_is_shown_from_then_on(authority: Authority) -> None:
    own = identity()
    verifier = Verifier(Credentials.issued(authority, own, "a"))
    later = certificate(authority, own, Validity(NOW, NOW + DAY))
    verifier.renew(later)
    assert validity_of(verifier.credentials.certificate).end == NOW + DAY
