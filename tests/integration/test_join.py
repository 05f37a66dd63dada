"""A cluster that grows by tokens and shrinks by revocation: real daemons, whose clocks are wrong by hours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from node.cli.admin import join_cluster
from node.cli.client import ControlClient
from node.config.schema import load
from node.identity.certificates import (
    ENDLESS,
    Authority,
    Subject,
    Validity,
    create_authority,
    issue,
    load_authority,
    validity_of,
)
from node.identity.credentials import FILE_NAME, Joined, save_joined
from node.identity.identity import load_or_create
from protocol.admission import Token, date, make_token
from protocol.errors import ShoalError
from protocol.ids import PeerId
from tests.support.clients import pull_through
from tests.support.image import Image
from tests.support.processes import wait_for
from tests.support.proxy import CountingProxy
from tests.support.site import P2PCTL, Node, run, wait_joined

SITE = "loopback"
HOUR, DAY = 3600, 86400
LIMIT_S = 60.0
CLOCK = """\
import time
real = time.time
time.time = lambda: real() + {shift}
from node.daemon import main
main()
"""


class Cluster:
    """`first` holds the key, and its clock is 9 hours behind. The others join. `second`'s clock is 9 hours ahead."""

    def __init__(self, folder: Path, url: str) -> None:
        self.key = folder / "cluster.key"
        assert run([*P2PCTL, "cluster", "init", str(self.key)]).returncode == 0
        self.authority = load_authority(self.key)
        self.first = Node("one", "127.0.0.1", folder / "one", url, key=self.key)
        self.second, self.third, self.fourth = (
            Node(name, f"127.0.0.{index}", folder / name, url)
            for index, name in ((2, "two"), (3, "three"), (4, "four"))
        )
        for node, hours in ((self.first, -9), (self.second, 9)):
            node.program = [sys.executable, "-c", CLOCK.format(shift=hours * HOUR)]

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.first, self.second, self.third, self.fourth

    def token(self, *options: str) -> str:
        answer = run([*P2PCTL, "cluster", "token", "--key", str(self.key), "--site", SITE, *options])
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()

    def revoke(self, at: Node, subject: str) -> subprocess.CompletedProcess[str]:
        return at.ctl(*("cluster", "revoke", "--key", str(self.key)), subject, "--json")


def place(node: Node, authority: Authority, validity: Validity, bootstrap: str) -> bytes:
    """Store a certificate for the node, as a join does."""
    peer = peer_id(node)
    certificate = issue(authority, Subject(peer, node.name, SITE), validity)
    save_joined(node.data, Joined(certificate=certificate, authority=authority.der, bootstrap=(bootstrap,)))
    return certificate


def plain_token(authority: Authority) -> Token:
    expires = int(time.time()) + DAY
    return Token(authority.cluster, SITE, made=0, expires=expires, uses=0, lifetime=0, id=bytes(16))


def shown(node: Node) -> bytes:
    return msgspec.json.decode((node.data / FILE_NAME).read_bytes(), type=Joined).certificate


def peer_id(node: Node) -> PeerId:
    """The output of `--print-peer-id`, without a process."""
    return load_or_create(node.data).peer_id


def address(node: Node) -> str:
    return f"/ip4/{node.host}/tcp/{node.libp2p_port}/p2p/{peer_id(node)}"


def p2pctl_join(node: Node, token: str, address: str) -> subprocess.CompletedProcess[str]:
    return run([*P2PCTL, "join", token, address, "--config", str(node.config), "--json"])


def why_not(node: Node, token: str, address: str) -> str:
    """The error of `p2pctl join`, without a process."""
    with pytest.raises(ShoalError) as caught:
        join_cluster(load(node.config), token, address)
    return str(caught.value)


def peers(node: Node) -> str:
    return ControlClient(node.socket).get("/peers").decode()


def doctor(node: Node, of: str = "certificate") -> str:
    report = node.ctl("doctor", "--json", "--config", str(node.config)).stdout
    return next(check["text"] for check in json.loads(report)["checks"] if check["name"] == of)


def where(node: Node) -> str:
    return f"{node.host}:{node.libp2p_port}"


def refusal(node: Node, peer: str, channel: str, why: str) -> str | None:
    """The log line of `node` about this refusal."""
    pattern = re.compile(rf'level=warning .*msg="refused {peer} at [^"]*{why}.*channel={channel}')
    return next((line for line in node.log.read_text().splitlines() if pattern.search(line)), None)


def wait_refused(node: Node, peer: str, channel: str, why: str) -> None:
    wait_for(f"{node.name} refuses on {channel}: {why}", lambda: refusal(node, peer, channel, why), seconds=LIMIT_S)


@pytest.fixture
def cluster(folder: Path, proxy: CountingProxy) -> Iterator[Cluster]:
    made = Cluster(folder, proxy.url)
    try:
        yield made
    finally:
        for node in made.nodes:
            node.end()


def test_a_cluster_grows_by_tokens_and_shrinks_by_revocation(cluster: Cluster, image: Image, folder: Path) -> None:
    first, second, third, _ = cluster.nodes
    now = int(time.time())
    first.start()
    token = cluster.token("--lifetime", "1d", "--expires", "24h")

    joined = json.loads(p2pctl_join(second, token, where(first)).stdout)
    assert (joined["site"], joined["peer_id"], joined["member"]) == (SITE, peer_id(second), address(first))
    assert json.loads(p2pctl_join(third, token, address(first)).stdout)["cluster"] == cluster.authority.cluster.hex()
    assert (second.data / FILE_NAME).stat().st_mode & 0o777 == 0o644
    # By its own clock the certificate of `second` expired 8 hours ago. Members still accept it, so it is renewed.
    ending = place(second, cluster.authority, Validity(now - DAY, now + HOUR), address(first))
    for node in (second, third):
        node.launch()
    for node in (second, third):
        node.wait_ready()
    wait_joined([first, second, third], 3)
    pull_through([second, third], folder / "pulled", image)
    wait_for("the certificate is renewed", lambda: shown(second) != ending, seconds=LIMIT_S)
    end = validity_of(shown(second)).end
    assert end is not None
    assert end > now + HOUR
    assert f"ends at {date(end)}; renewal was due" in doctor(second), "by its clock a renewal is due again"

    _no_other_node_joins(cluster, token)

    gone = peer_id(third)
    answer = cluster.revoke(first, gone)
    assert json.loads(answer.stdout) == {"subject": gone, "new": True, "total": 1}, answer.stderr
    for node in (first, second):
        wait_for(f"{node.name} forgets it", lambda node=node: gone not in peers(node), seconds=LIMIT_S)  # type: ignore[misc]
        wait_refused(node, gone, "bulk", "certificate revoked")
    wait_refused(first, gone, "introduction", "certificate revoked")
    cluster.revoke(third, gone)  # the others exclude it at once, possibly before they sent it the revocation
    assert "revoked: no member admits" in doctor(third)
    third.stop()
    assert "revoked: no member admits" in doctor(third), "its files also show the revocation"
    assert "revoked" in why_not(third, token, where(first))
    row = second.status()["cluster"]
    assert row["id"] == cluster.authority.cluster.hex()
    assert (row["admits"], row["revocations"]) == (False, 1)
    assert first.status()["cluster"]["admits"] is True
    assert first.status()["peers_alive"] == second.status()["peers_alive"] == 1

    first.stop()
    wait_for("second is alone", lambda: not second.status()["peers_alive"], seconds=LIMIT_S)
    assert doctor(second, "peers") == "none found by 1 bootstrap addresses"
    first.start()
    assert json.loads(cluster.revoke(first, gone).stdout)["new"] is False
    for node in cluster.nodes:
        if node.log.exists():
            assert token[:40] not in node.log.read_text()


def _no_other_node_joins(cluster: Cluster, token: str) -> None:
    first, second, _, fourth = cluster.nodes
    other_key = cluster.key.with_name("other.key")
    create_authority(other_key)
    other = load_authority(other_key)
    now = int(time.time())
    ours = plain_token(cluster.authority)
    stale = make_token(msgspec.structs.replace(ours, expires=now - DAY), cluster.authority.key.sign)
    foreign = make_token(msgspec.structs.replace(ours, cluster=other.cluster), other.key.sign)
    forged = make_token(ours, other.key.sign)
    for text, node, why in (
        (token, second, "does not hold the cluster's key"),
        (stale, first, "expired"),
        (foreign, first, "of the cluster"),
        (forged, first, "altered"),
        ("shoal-join-1.abc", first, "not a join token"),
    ):
        assert why in why_not(fourth, text, where(node))
        assert not (fourth.data / FILE_NAME).exists()
    wait_refused(first, peer_id(fourth), "join", "expired")

    for authority, end, why in (
        (cluster.authority, now - 2 * DAY, "certificate expired"),
        (other, None, "certificate of another cluster"),
    ):
        place(fourth, authority, Validity(now - 9 * DAY, end), address(first))
        fourth.start()
        wait_refused(first, peer_id(fourth), "introduction", why)
        assert fourth.status()["peers_alive"] == 0
        fourth.stop()


def test_the_error_of_a_join_is_shown(folder: Path) -> None:
    key = folder / "cluster.key"
    create_authority(key)
    node = Node("node", "127.0.0.1", folder / "node", "http://127.0.0.1:9", key=key)
    authority = load_authority(key)
    token = make_token(plain_token(authority), authority.key.sign)
    refused = p2pctl_join(node, token, where(node))
    assert refused.returncode == 1
    assert "needs no token" in refused.stderr
    alone = Node("alone", "127.0.0.1", folder / "alone", "http://127.0.0.1:9")
    assert "no answer from 127.0.0.1:1" in why_not(alone, token, "127.0.0.1:1")
    assert "not an address" in why_not(alone, token, "nowhere")
    other = folder / "other.key"
    create_authority(other)
    place(node, load_authority(other), ENDLESS, address(alone))
    answer = run([*node.program, "--config", str(node.config)])
    assert answer.returncode == 2
    assert "remove one of them" in answer.stderr
