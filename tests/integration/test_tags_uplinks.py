"""Moving tags, mirrors and registries that fail, and limits of the uplink: real daemons and a real registry."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from node.oci.signatures import signature_tag
from protocol.ids import Digest, ObjectRef
from tests.support import image as images
from tests.support import registry as registries
from tests.support import signing
from tests.support.blobs import Blob
from tests.support.clients import REPOSITORY, TAG, finish_pulls, pull_through
from tests.support.image import Image
from tests.support.processes import wait_for
from tests.support.proxy import CountingProxy
from tests.support.pull import pull_with_skopeo
from tests.support.site import UPSTREAM, Node, site, start_all

TTL_S = 1.5
TAGS = f"""
[[tags]]
match = "{UPSTREAM}/demo/*:never"
cache = false
[[tags]]
match = "{UPSTREAM}/*"
ttl = "{TTL_S}s"
"""


def configured(nodes: Sequence[Node], *, upstream: str = "", url: str = "", tags: str = "") -> None:
    """Add lines to the upstream, or change its url, add tables at the configuration's end, and start the nodes."""
    for node in nodes:
        lines = node.config.read_text().splitlines()
        at = next(number for number, line in enumerate(lines) if line.startswith("url = "))
        lines[at] = f"url = {url}" if url else lines[at]
        node.config.write_text("\n".join([*lines[: at + 1], upstream, *lines[at + 1 :], tags]))
    start_all(nodes)


def digest_of(node: Node, tag: str, repository: str = "demo/moving") -> str | int:
    """The digest that the node's mirror gives for a tag, or the status of its answer if it gives none."""
    connection = http.client.HTTPConnection(node.host, node.mirror_port, timeout=60)
    with closing(connection):
        connection.request("HEAD", f"/v2/{repository}/manifests/{tag}?ns={UPSTREAM}")
        response = connection.getresponse()
        return response.getheader("Docker-Content-Digest", "") if response.status == 200 else response.status


def tag_row(node: Node, tag: str) -> dict[str, Any]:
    answer = node.ctl("tags", f"{UPSTREAM}/demo/moving:{tag}", "--json")
    assert answer.returncode == 0, answer.stderr
    (row,) = json.loads(answer.stdout)["tags"]
    return dict(row)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Image]:
    folder = tmp_path_factory.mktemp("versions")
    return [images.build(folder / str(number), [[("version", bytes([number]))]]) for number in range(4)]


@pytest.fixture
def own_registry(folder: Path) -> Iterator[registries.Registry]:
    if not registries.installed():
        pytest.skip("docker-registry is not installed: run .ci/packages as root")
    with registries.docker_registry(folder / "registry") as running:
        yield running


def test_a_moved_tag_is_seen_within_its_time_to_live_and_all_nodes_keep_their_answers_offline(
    folder: Path, own_registry: registries.Registry, versions: list[Image]
) -> None:
    with (
        CountingProxy(own_registry.host, own_registry.port) as proxy,
        site(folder / "site", proxy.url, 3, start=False) as nodes,
        ThreadPoolExecutor(len(nodes)) as pool,
    ):
        configured(nodes, tags=TAGS)
        for version in versions:
            registries.push(own_registry, version, "demo/moving", "latest")
            moved, digest = time.monotonic(), version.index.digest

            def watch(node: Node, moved: float = moved, digest: str = digest) -> int:
                """The number of answers until the new one. Requests after the time to live must get the new one."""
                answers = 0
                while True:
                    asked, answers = time.monotonic(), answers + 1
                    if digest_of(node, "latest") == digest:
                        return answers
                    assert asked - moved < TTL_S

            assert sum(pool.map(watch, nodes)) >= len(nodes)
        rows = [tag_row(node, "latest") for node in nodes]
        assert {row["digest"] for row in rows} == {versions[-1].index.digest}
        assert {row["rule"] for row in rows} == {f"{UPSTREAM}/*"}
        assert {(row["source"], *row["told_by"]) for row in rows} == {("registry",)}, "each node asked it itself"

        registries.push(own_registry, versions[0], "demo/moving", "never")
        assert {digest_of(node, "never") for node in nodes} == {versions[0].index.digest}
        registries.push(own_registry, versions[1], "demo/moving", "never")
        assert {digest_of(node, "never") for node in nodes} == {versions[1].index.digest}

        proxy.cut()
        assert [digest_of(node, "never") for node in nodes] == [503] * 3
        wait_for("the tag is old", lambda: tag_row(nodes[0], "latest")["state"] != "fresh", every=0.1)
        assert {digest_of(node, "latest") for node in nodes} == {versions[-1].index.digest}
        assert tag_row(nodes[0], "latest")["state"] == "stale"
        assert "stale" in nodes[0].ctl("tags", "moving:latest").stdout
        proxy.restore()
        wait_for(
            "the registry is asked again",
            lambda: digest_of(nodes[0], "latest") and tag_row(nodes[0], "latest")["state"] == "fresh",
            every=0.1,
        )


def test_a_mirror_that_lacks_an_image_or_fails_costs_no_pull(
    folder: Path, image: Image, proxy: CountingProxy, own_registry: registries.Registry
) -> None:
    with (
        CountingProxy(own_registry.host, own_registry.port) as mirror,
        site(folder / "site", proxy.url, 2, start=False) as nodes,
    ):
        configured(nodes, url=json.dumps([mirror.url, proxy.url]))
        pull_through(nodes[:1], folder / "lacking", image)
        assert mirror.count.requests > 0
        assert proxy.count.received >= image.size
        endpoints = nodes[0].status()["upstreams"][0]["endpoints"]
        assert [endpoint["url"] for endpoint in endpoints] == [mirror.url, proxy.url]
        assert [endpoint["problem"] for endpoint in endpoints] == ["", ""]
        mirror.cut()
        pull_through(nodes, folder / "failing", image)
        assert digest_of(nodes[0], "nothing", "demo/app") == 404
        assert any(node.status()["upstreams"][0]["endpoints"][0]["problem"] for node in nodes), "at the name's home"
        doctor = json.loads(nodes[0].ctl("doctor", "--json").stdout)["checks"]
        levels = {check["name"]: check["level"] for check in doctor}
        assert levels[f"upstream {UPSTREAM}"] == "ok"
        assert levels[f"upstream {UPSTREAM} by {mirror.url}"] == "warn"


def test_a_spent_daily_budget_gives_a_clear_error_even_after_a_restart(
    folder: Path, image: Image, proxy: CountingProxy
) -> None:
    daily = 6_000_000
    with site(folder / "site", proxy.url, 1, start=False) as nodes:
        (node,) = nodes
        configured(nodes, upstream=f'daily = "{daily}"')
        answer = node.ctl("pull", f"{REPOSITORY}:{TAG}")
        assert answer.returncode == 1
        assert "the uplink budget of the day is spent" in answer.stderr
        assert proxy.count.received <= daily + (8 << 20), "the kernel and the proxy may have received some more"
        for _ in range(2):
            use = node.status()["upstreams"][0]["uplink"]
            assert (use["used_today_bytes"], use["spent"]) == (daily, True)
            node.stop()
            node.start()
        assert "spent" in node.ctl("status").stdout
        answer = node.ctl("doctor")
        assert f"uplink {UPSTREAM}" in answer.stdout
        connection = http.client.HTTPConnection(node.host, node.mirror_port, timeout=60)
        with closing(connection):
            connection.request("GET", f"/v2/demo/app/blobs/{image.layers[2].digest}?ns={UPSTREAM}")
            response = connection.getresponse()
            assert (response.status, b"budget" in response.read()) == (503, True)


def test_a_prefetch_waits_for_the_hours_of_the_uplink_and_a_pull_does_not(
    folder: Path, image: Image, proxy: CountingProxy
) -> None:
    later = [time.strftime("%H:%M", time.localtime(time.time() + hours * 3600)) for hours in (3, 5)]
    with site(folder / "site", proxy.url, 3, start=False) as nodes:
        configured(nodes, upstream=f'hours = ["{later[0]}-{later[1]}"]')

        def error() -> str:
            (row,) = json.loads(nodes[0].ctl("prefetch", "--status", "--json").stdout)["rows"]
            return str(row["error"]) if row["state"] == "waiting" else ""

        assert nodes[0].ctl("prefetch", f"{REPOSITORY}:{TAG}").returncode == 0
        wait_for("the prefetch waits for the hours", lambda: "in the hours" in error(), every=0.1)
        assert proxy.count.received < 0.1 * image.size, "names only"
        pull_through(nodes, folder / "out", image)
        assert proxy.count.received <= 1.05 * image.size


def test_a_rate_holds_for_the_whole_site(folder: Path, image: Image, proxy: CountingProxy) -> None:
    rate = 8 << 20
    with site(folder / "site", proxy.url, 3, start=False) as nodes:
        configured(nodes, upstream=f'rate = "{rate}"')
        began = time.monotonic()
        pull_through(nodes, folder / "out", image)
        took = time.monotonic() - began
        assert took >= 0.9 * image.size / rate - 1, "never faster"
        assert proxy.count.received <= 1.3 * image.size


SIGNED = "demo/signed"


def verified_by(key: Path, more: str = "") -> str:
    return f'[[tags]]\nmatch = "{UPSTREAM}/{SIGNED}:*"\nttl = "{TTL_S}s"\nverify = "{key}"\n{more}'


def sign_with_a_key(registry: registries.Registry, version: Image, signer: signing.Signer) -> None:
    """Push the signature that `cosign sign --key` pushes for an image."""
    documents: list[bytes] = []

    def add(document: bytes) -> ObjectRef:
        documents.append(document)
        return Blob(document).ref

    digest = Digest.parse(version.index.digest)
    payload = signing.simple_payload(digest)
    manifest = signing.manifest_of(signing.simple_layer(signer, add, payload))
    registries.push_manifest(registry, SIGNED, signature_tag(digest), manifest, signing.CONFIG, *documents)


def test_a_tag_is_given_only_with_a_signature_of_a_configured_key(
    folder: Path, own_registry: registries.Registry, versions: list[Image]
) -> None:
    """S-48"""
    owner, stranger, key = signing.ecdsa(), signing.ecdsa(), folder / "cosign.pub"
    key.write_bytes(owner.pem)
    for tag, version, signer in (("good", versions[0], owner), ("bad", versions[1], stranger)):
        registries.push(own_registry, version, SIGNED, tag)
        sign_with_a_key(own_registry, version, signer)
    registries.push(own_registry, versions[2], SIGNED, "none")
    with (
        CountingProxy(own_registry.host, own_registry.port) as proxy,
        site(folder / "site", proxy.url, 3, start=False) as nodes,
    ):
        configured(nodes, tags=verified_by(key))
        finish_pulls([pull_with_skopeo(nodes[0].mirror, f"{UPSTREAM}/{SIGNED}", "good", folder / "out")], versions[0])
        for tag, version in (("bad", versions[1]), ("none", versions[2])):
            assert digest_of(nodes[0], tag, SIGNED) == 403
            assert digest_of(nodes[0], version.index.digest, SIGNED) == version.index.digest, "a digest needs none"
            answer = nodes[0].ctl("pull", f"{UPSTREAM}/{SIGNED}:{tag}")
            assert answer.returncode == 1
            for part in (f"{SIGNED}:{tag}", version.index.digest, str(key)):
                assert part in answer.stderr
        signatures = signature_tag(Digest.parse(versions[0].index.digest))
        for tag in ("good", signatures):
            answer = nodes[0].ctl("export", f"{UPSTREAM}/{SIGNED}:{tag}", str(folder / f"{tag}.tar"))
            assert answer.returncode == 0, answer.stderr
        proxy.cut()
        assert digest_of(nodes[1], "good", SIGNED) == versions[0].index.digest, "one member's word and the signature"
        assert digest_of(nodes[1], "bad", SIGNED) == 503, "its signature does not help, and others may be out of reach"
        wait_for("the tag is old", lambda: digest_of(nodes[0], "good", SIGNED) == versions[0].index.digest, every=0.1)
        nodes[0].stop()
        nodes[0].start()
        assert digest_of(nodes[0], "good", SIGNED) == versions[0].index.digest, "what was verified is remembered"
        proxy.restore()
        # A reload uses the file's new key; a file that is no key leaves all as it was.
        nodes[0].config.write_text(nodes[0].config.read_text().replace(str(key), str(folder / "none.pub")))
        assert "none.pub" in nodes[0].ctl("reload").stderr
        assert digest_of(nodes[0], "good", SIGNED) == versions[0].index.digest
        (folder / "none.pub").write_bytes(stranger.pem)
        assert nodes[0].ctl("reload").returncode == 0
        wait_for("the other key counts", lambda: digest_of(nodes[0], "bad", SIGNED) == versions[1].index.digest)
        assert digest_of(nodes[0], "good", SIGNED) == 403
    with site(folder / "cut-off", proxy.url, 1, start=False) as nodes:
        configured(nodes, tags=verified_by(key))
        assert nodes[0].ctl("import", str(folder / "good.tar")).returncode == 0
        assert digest_of(nodes[0], "good", SIGNED) == 503, "its signature is not here"
        assert nodes[0].ctl("import", str(folder / f"{signatures}.tar")).returncode == 0
        assert digest_of(nodes[0], "good", SIGNED) == versions[0].index.digest
