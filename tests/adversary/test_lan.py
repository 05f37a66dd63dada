"""Hosts beside and above the site, in network namespaces: a stranger on the LAN, and a registry that sends nodes to
their own loopback."""

from __future__ import annotations

import http.client
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from node.identity.certificates import load_authority
from node.membership.mdns import cluster_tag
from tests.support.lab import WAN, Lab, NoLabError, Rates, check_lab, lab
from tests.support.processes import running, wait_for
from tests.support.redirector import PLACES
from tests.support.siege import alive, quarantined, sound
from tests.support.site import UPSTREAM, Node, site
from tests.support.watched_daemon import WATCHED

RATE = 1e9
ANNOUNCED = 256
MET_S = 20.0
"""Time in which a configured peer must be met once it answers."""
REGISTRY_PORT, SERVICE_PORT = 5000, 5999
DIGEST = "sha256:" + "ab" * 32


@pytest.fixture
def network() -> Iterator[Lab]:
    try:
        check_lab()
    except NoLabError as error:
        pytest.skip(str(error))
    with lab(3, Rates(RATE, RATE)) as made:
        yield made


def watched(nodes: list[Node], **texts: str) -> None:
    for node in nodes:
        node.program = WATCHED
        text = node.config.read_text()
        for old, new in texts.items():
            text = text.replace(old.replace("__", " = "), new)
        node.config.write_text(text)


def test_strangers_announcements_keep_no_configured_peer_waiting(folder: Path, network: Lab) -> None:
    """S-33: 256 peers at an address that accepts connections and says nothing. The bootstrap peer comes later."""
    with site(folder / "site", f"http://{WAN}:{REGISTRY_PORT}", 2, start=False, lab=network) as (node, seed):
        watched([node, seed], mdns__false="mdns = true")
        seed.config.write_text(seed.config.read_text().replace(f'"{node.address()}"', ""))
        cluster = cluster_tag(load_authority(folder / "site" / "cluster.key").der)
        stranger = [sys.executable, "-m", "tests.support.mdns_stranger", network.address(2), cluster, str(ANNOUNCED)]
        log = folder / "stranger"
        with running([*network.nodes[2].prefix, *stranger], log):
            wait_for("all peers are announced", lambda: log.read_text().startswith("0"))
            node.start()
            wait_for("the node tries to reach them", lambda: log.read_text().split()[-1] != "0")
            with sound(node):
                seed.start()
                wait_for("the seed is met", lambda: seed.name in alive(node), seconds=MET_S, every=0.2)
            assert not quarantined(node)


@pytest.fixture
def redirected(folder: Path, network: Lab) -> Iterator[tuple[Node, Path]]:
    """A node whose registry redirects, and the log of a service on the node's own host."""
    host, log = network.nodes[0], folder / "service"
    # The registry's own address counts as private here, so that it may lead to other private addresses.
    subprocess.run(["ip", "-n", host.name, "address", "add", "169.254.169.254/32", "dev", "lo"], check=True)
    module = [sys.executable, "-m", "tests.support.redirector"]
    with (
        running([*host.prefix, *module, "0.0.0.0", str(SERVICE_PORT)], log),
        running([*network.wan.prefix, *module, WAN, str(REGISTRY_PORT), str(SERVICE_PORT)], folder / "registry"),
        site(folder / "site", f"http://{WAN}:{REGISTRY_PORT}", 1, start=False, lab=network) as (node,),
    ):
        watched([node])
        for place, port in ((WAN, REGISTRY_PORT), ("127.0.0.1", SERVICE_PORT)):
            inside = network.wan if place == WAN else host
            wait_for("it listens", lambda place=place, port=port, inside=inside: listens(inside, place, port))  # type: ignore[misc]
        node.start()
        yield node, log


def listens(inside: object, host: str, port: int) -> bool:
    with inside.entered():  # type: ignore[attr-defined]
        connection = http.client.HTTPConnection(host, port, timeout=5)
        with closing(connection):
            try:
                connection.connect()
            except OSError:
                return False
            return True


def get(network: Lab, node: Node, path: str) -> tuple[int, bytes]:
    with (
        network.nodes[0].entered(),
        closing(http.client.HTTPConnection(node.host, node.mirror_port, timeout=60)) as line,
    ):
        line.request("GET", f"/v2/{UPSTREAM}/{path}", headers={"Accept": "application/vnd.oci.image.index.v1+json"})
        answer = line.getresponse()
        return answer.status, answer.read()


def test_a_registry_cannot_send_a_node_to_its_own_host(network: Lab, redirected: tuple[Node, Path]) -> None:
    """S-62: by redirects, by the realm of tokens, and by links to next pages, in every spelling of the address."""
    node, log = redirected
    with sound(node):
        for name in PLACES:
            for path in (
                "manifests/latest",
                f"manifests/{DIGEST}",
                f"blobs/{DIGEST}",
                "tags/list",
                f"referrers/{DIGEST}",
            ):
                for how in ("", "_realm"):
                    status, body = get(network, node, f"{name}{how}/{path}")
                    assert status != 200 or path.startswith("referrers"), (name, how, path, body)
                    assert b"secret" not in body
                    assert b"root:" not in body
        for name in PLACES:
            _, body = get(network, node, f"{name}_next/tags/list")
            assert b"secret" not in body
    visits = [line for line in log.read_text().splitlines() if line.startswith(("GET", "HEAD", "POST"))]
    assert not visits, visits[:5]
