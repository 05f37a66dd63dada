"""A cluster that grows by tokens and shrinks by revocation, with real daemons, whose clocks are wrong by hours."""

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
from cryptography.hazmat.primitives.serialization import Encoding

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
CLOCK = """\
import time
real = time.time
time.time = lambda: real() + {shift}
from node.daemon import main
main()
"""


class Cluster:
    """`one` holds the key, and its clock is 9 hours behind; `two`, which is 9 hours ahead, and the others join."""

    def __init__(self, folder: Path, url: str) -> None:
        self.key = folder / "cluster.key"
        assert run([*P2PCTL, "cluster", "init", str(self.key)]).returncode == 0
        self.authority = load_authority(self.key)
        self.one = Node("one", "127.0.0.1", folder / "one", url, key=self.key)
        self.two, self.three, self.four = (
            Node(name, f"127.0.0.{index}", folder / name, url)
            for index, name in ((2, "two"), (3, "three"), (4, "four"))
        )
        for node, hours in ((self.one, -9), (self.two, 9)):
            node.program = [sys.executable, "-c", CLOCK.format(shift=hours * HOUR)]

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.one, self.two, self.three, self.four

    def token(self, *options: str) -> str:
        answer = run([*P2PCTL, "cluster", "token", "--key", str(self.key), "--site", SITE, *options])
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()


def place(node: Node, authority: Authority, validity: Validity, bootstrap: str) -> bytes:
    """A certificate as a join would have brought it."""
    peer = peer_id(node)
    certificate = issue(authority, Subject(peer, node.name, SITE), validity).public_bytes(Encoding.DER)
    save_joined(node.data, Joined(certificate=certificate, authority=authority.der, bootstrap=(bootstrap,)))
    return certificate


def shown(node: Node) -> bytes:
    return msgspec.json.decode((node.data / FILE_NAME).read_bytes(), type=Joined).certificate


def peer_id(node: Node) -> PeerId:
    """As `--print-peer-id` tells it, without a process."""
    return load_or_create(node.data).peer_id


def address(node: Node) -> str:
    return f"/ip4/{node.host}/tcp/{node.libp2p_port}/p2p/{peer_id(node)}"


def p2pctl_join(node: Node, token: str, address: str) -> subprocess.CompletedProcess[str]:
    return run([*P2PCTL, "join", token, address, "--config", str(node.config), "--json"])


def why_not(node: Node, token: str, address: str) -> str:
    """What `p2pctl join` would say, without a process."""
    with pytest.raises(ShoalError) as caught:
        join_cluster(load(node.config), token, address)
    return str(caught.value)


def peers(node: Node) -> str:
    return ControlClient(node.socket).get("/peers").decode()


def doctor(node: Node, of: str = "certificate") -> str:
    told = node.ctl("doctor", "--json", "--config", str(node.config)).stdout
    return next(check["text"] for check in json.loads(told)["checks"] if check["name"] == of)


def where(node: Node) -> str:
    return f"{node.host}:{node.libp2p_port}"


def refusal(node: Node, peer: str, channel: str, why: str) -> str | None:
    """The log line of `node` that says so."""
    pattern = re.compile(rf'level=warning .*msg="refused {peer} at [^"]*{why}.*channel={channel}')
    return next((line for line in node.log.read_text().splitlines() if pattern.search(line)), None)


def wait_refused(node: Node, peer: str, channel: str, why: str) -> None:
    wait_for(f"{node.name} refuses on {channel}: {why}", lambda: refusal(node, peer, channel, why), seconds=20)


@pytest.fixture
def cluster(folder: Path, proxy: CountingProxy) -> Iterator[Cluster]:
    made = Cluster(folder, proxy.url)
    try:
        yield made
    finally:
        for node in made.nodes:
            node.end()


def test_a_cluster_grows_by_tokens_and_shrinks_by_revocation(cluster: Cluster, image: Image, folder: Path) -> None:
    one, two, three, _ = cluster.nodes
    now = int(time.time())
    one.start()
    token = cluster.token("--lifetime", "1d", "--expires", "24h")

    told = json.loads(p2pctl_join(two, token, where(one)).stdout)
    assert (told["site"], told["peer_id"], told["member"]) == (SITE, peer_id(two), address(one))
    assert json.loads(p2pctl_join(three, token, address(one)).stdout)["cluster"] == cluster.authority.cluster.hex()
    joined = (two.data / FILE_NAME).stat()
    assert joined.st_mode & 0o777 == 0o644
    # By the clock of `two` its certificate is over by 8 hours, which members forgive; so it has it renewed.
    ending = place(two, cluster.authority, Validity(now - DAY, now + HOUR), address(one))
    for node in (two, three):
        node.launch()
    for node in (two, three):
        node.wait_ready()
    wait_joined([one, two, three], 3)
    pull_through([two, three], folder / "pulled", image)
    wait_for("the certificate is renewed", lambda: shown(two) != ending, seconds=20)
    end = validity_of(shown(two)).end
    assert end is not None
    assert end > now + HOUR
    assert f"ends at {date(end)}; renewal was due" in doctor(two), "by its clock it is due again"

    _nobody_else_gets_in(cluster, token)

    gone = peer_id(three)
    answer = one.ctl("cluster", "revoke", "--key", str(cluster.key), gone, "--json")
    assert json.loads(answer.stdout) == {"subject": gone, "new": True, "total": 1}, answer.stderr
    for node in (one, two):
        wait_for(f"{node.name} lets it go", lambda node=node: gone not in peers(node))  # type: ignore[misc]
        wait_refused(node, gone, "bulk", "certificate revoked")
    wait_refused(one, gone, "introduction", "certificate revoked")
    three.ctl("cluster", "revoke", "--key", str(cluster.key), gone)  # others, who shut it out at once, may not tell it
    assert "revoked: no member admits" in doctor(three)
    three.stop()
    assert "revoked: no member admits" in doctor(three), "and so do its files"
    assert "revoked" in why_not(three, token, where(one))
    row = two.status()["cluster"]
    assert row["id"] == cluster.authority.cluster.hex()
    assert (row["admits"], row["revocations"]) == (False, 1)
    assert one.status()["cluster"]["admits"] is True
    assert one.status()["peers_alive"] == two.status()["peers_alive"] == 1

    one.stop()
    wait_for("two is alone", lambda: not two.status()["peers_alive"])
    assert doctor(two, "peers") == "none found by 1 bootstrap addresses"
    one.start()
    assert json.loads(one.ctl("cluster", "revoke", "--key", str(cluster.key), gone, "--json").stdout)["new"] is False
    for node in cluster.nodes:
        if node.log.exists():
            assert token[:40] not in node.log.read_text()


def _nobody_else_gets_in(cluster: Cluster, token: str) -> None:
    one, two, _, four = cluster.nodes
    other_key = cluster.key.with_name("other.key")
    create_authority(other_key)
    other = load_authority(other_key)
    now = int(time.time())
    ours = Token(cluster.authority.cluster, SITE, 0, now + DAY, 0, 0, bytes(16))
    stale = make_token(msgspec.structs.replace(ours, expires=now - DAY), cluster.authority.key.sign)
    foreign = make_token(msgspec.structs.replace(ours, cluster=other.cluster), other.key.sign)
    forged = make_token(ours, other.key.sign)
    for what, node, why in (
        (token, two, "does not hold the cluster's key"),
        (stale, one, "expired"),
        (foreign, one, "of the cluster"),
        (forged, one, "altered"),
        ("shoal-join-1.abc", one, "not a join token"),
    ):
        assert why in why_not(four, what, where(node))
        assert not (four.data / FILE_NAME).exists()
    wait_refused(one, peer_id(four), "join", "expired")

    for authority, end, why in (
        (cluster.authority, now - 2 * DAY, "certificate expired"),
        (other, None, "certificate of another cluster"),
    ):
        place(four, authority, Validity(now - 9 * DAY, end), address(one))
        four.start()
        wait_refused(one, peer_id(four), "introduction", why)
        assert four.status()["peers_alive"] == 0
        four.stop()


def test_what_is_wrong_with_a_join_is_said(folder: Path) -> None:
    key = folder / "cluster.key"
    create_authority(key)
    node = Node("node", "127.0.0.1", folder / "node", "http://127.0.0.1:9", key=key)
    authority = load_authority(key)
    token = make_token(Token(authority.cluster, SITE, 0, 1 << 33, 0, 0, bytes(16)), authority.key.sign)
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
    assert "remove the one or the other" in answer.stderr
