"""Private images: a real docker-registry, real tokens, real daemons."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support import image as images
from tests.support import registry as registries
from tests.support.containerd import containerd
from tests.support.image import INDEX, MANIFEST, Image
from tests.support.processes import free_ports
from tests.support.proxy import CountingProxy
from tests.support.site import UPSTREAM, Node, site, start_all
from tests.support.token_server import SERVICE, TokenServer

PRIVATE, OTHER, OPEN, TAG = "team/app", "team/other", "public/app", "v1"
ALICE, BOB = "alice", "bob"
PASSWORDS = {ALICE: "correct-horse-battery", BOB: "bobs-own-password"}
HTPASSWD = f"{ALICE}:$2b$05$IIrQ9NqnVwhRyGDxzJC40eCXeGWcLNwDM782KhL8n3U.lwI/XrXTG\n"
"""The bcrypt hash of that password."""
MAX_COPIES = 1.05

pytestmark = pytest.mark.skipif(not registries.installed(), reason="docker-registry is not installed")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return images.build(tmp_path_factory.mktemp("small") / "layout", [[("small", b"for everybody")]])


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, image: Image, small: Image) -> Path:
    """The folder of a registry that holds the three repositories."""
    folder = tmp_path_factory.mktemp("private-registry")
    with registries.docker_registry(folder) as registry:
        registries.push(registry, image, PRIVATE, TAG)
        for repository in (OTHER, OPEN):
            registries.push(registry, small, repository, TAG)
    return folder


@dataclass(frozen=True, slots=True)
class Guarded:
    """A registry that asks for credentials, behind a counting proxy."""

    tokens: TokenServer
    proxy: CountingProxy


@pytest.fixture
def guarded(stored: Path, tmp_path: Path) -> Iterator[Guarded]:
    rights = {ALICE: [PRIVATE], BOB: [OTHER], "": [OPEN]}
    with (
        TokenServer(tmp_path, PASSWORDS, rights) as tokens,
        registries.docker_registry(stored, auth=tokens.registry_auth()) as registry,
        CountingProxy(registry.host, registry.port) as proxy,
    ):
        yield Guarded(tokens, proxy)


@contextmanager
def talkative(folder: Path, url: str, count: int) -> Iterator[list[Node]]:
    """A site with logs at level debug, and metrics."""
    with site(folder, url, count, start=False) as nodes:
        for node in nodes:
            (port,) = free_ports(node.host, 1)
            text = node.config.read_text().replace('metrics = ""', f'metrics = "{node.host}:{port}"')
            node.config.write_text(text.replace("[node]", '[node]\nlog = "debug"'))
        start_all(nodes)
        yield nodes


def ask(node: Node, repository: str, path: str, authorization: str = "") -> httpx.Response:
    headers = {"Accept": f"{INDEX}, {MANIFEST}"} | ({"Authorization": authorization} if authorization else {})
    return httpx.get(f"{node.mirror}/v2/{repository}/{path}?ns={UPSTREAM}", headers=headers, trust_env=False)


def read_all(node: Node, image: Image, authorization: str) -> None:
    """Read the image as a client does, and verify every digest."""
    assert ask(node, PRIVATE, f"manifests/{TAG}", authorization).status_code == 200
    for kind, blobs in (("manifests", (image.index, image.manifest)), ("blobs", image.blobs)):
        for blob in blobs:
            answer = ask(node, PRIVATE, f"{kind}/{blob.digest}", authorization)
            assert answer.status_code == 200, answer.text
            assert "sha256:" + hashlib.sha256(answer.content).hexdigest() == blob.digest


def is_refused(node: Node, image: Image, authorization: str = "") -> bool:
    """Try every path to the image's content. Returns True, or fails with the path that is open."""
    digest = image.manifest.digest
    objects = (f"manifests/{TAG}", f"manifests/{digest}", f"blobs/{image.layers[0].digest}")
    for path in (*objects, "tags/list", f"referrers/{digest}"):
        answer = ask(node, PRIVATE, path, authorization)
        assert (answer.status_code, answer.json()["errors"][0]["code"]) == (401, "UNAUTHORIZED"), path
        assert image.layers[0].digest not in answer.text
    return True


def test_every_node_serves_a_private_image_to_permitted_clients_only(
    folder: Path, image: Image, guarded: Guarded
) -> None:
    tokens, proxy = guarded.tokens, guarded.proxy
    alice, bob = (f"Bearer {tokens.token(user, PRIVATE, OTHER)}" for user in (ALICE, BOB))
    wrong = alice[:-6] + "AAAAAA"
    with talkative(folder / "site", proxy.url, 3) as nodes:
        assert all(is_refused(node, image) for node in nodes)
        challenge = ask(nodes[0], PRIVATE, f"manifests/{TAG}").headers["www-authenticate"]
        assert challenge == f'Bearer realm="{tokens.realm}",service="{SERVICE}",scope="repository:{PRIVATE}:pull"'

        read_all(nodes[0], image, alice)
        for node in nodes:
            assert all(is_refused(node, image, authorization) for authorization in ("", wrong, bob))
        assert ask(nodes[0], OTHER, f"manifests/{TAG}", bob).status_code == 200
        for node in nodes[1:]:
            read_all(node, image, alice)
        assert proxy.count.received <= MAX_COPIES * image.size, proxy.count.asked.most_common(5)
        assert ask(nodes[1], PRIVATE, "tags/list", alice).json()["tags"] == [TAG]

        proxy.cut()
        for node in nodes:
            read_all(node, image, alice)
            assert is_refused(node, image)
            assert ask(node, PRIVATE, f"manifests/{TAG}", f"Bearer {tokens.token(BOB, PRIVATE)}").status_code == 503

        secrets = [PASSWORDS[ALICE], *(secret for header in (alice, bob, wrong) for secret in secrets_of(header))]
        for node in nodes:
            assert_silent(node, secrets)


def test_a_public_repository_needs_no_token_and_gives_no_private_blob(
    folder: Path, image: Image, small: Image, guarded: Guarded
) -> None:
    with site(folder / "site", guarded.proxy.url, 2) as nodes:
        read_all(nodes[0], image, f"Bearer {guarded.tokens.token(ALICE, PRIVATE)}")
        for node in nodes:
            assert ask(node, OPEN, f"manifests/{TAG}").status_code == 200
            assert ask(node, OPEN, f"blobs/{small.layers[0].digest}").status_code == 200
            assert ask(node, OPEN, f"blobs/{image.layers[0].digest}").status_code == 404
        guarded.proxy.reset()
        for node in nodes:
            assert ask(node, OPEN, f"blobs/{small.layers[0].digest}").status_code == 200
        assert guarded.proxy.count.requests == 0, "a warm hit makes no request"
        guarded.proxy.cut()
        for node in nodes:
            node.kill()
        start_all(nodes)
        for node in nodes:
            assert ask(node, OPEN, f"blobs/{small.layers[0].digest}").status_code == 200, "public outlives a restart"
            assert ask(node, PRIVATE, f"manifests/{TAG}").status_code == 503


def test_five_nodes_at_once_read_one_copy_of_a_private_image(folder: Path, image: Image, guarded: Guarded) -> None:
    with site(folder / "site", guarded.proxy.url) as nodes, ThreadPoolExecutor(5) as pool:
        list(
            pool.map(
                lambda node: read_all(node, image, f"Bearer {guarded.tokens.token(ALICE, PRIVATE)}"),
                nodes,
            )
        )
        assert guarded.proxy.count.received <= MAX_COPIES * image.size, guarded.proxy.count.asked.most_common(5)


def test_the_password_of_a_registry_without_tokens_is_checked_in_the_same_way(
    folder: Path, image: Image, stored: Path, tmp_path: Path
) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    auth = f"auth:\n  htpasswd: {{realm: test, path: '{tmp_path}/htpasswd'}}\n"
    with (
        registries.docker_registry(stored, auth=auth) as registry,
        talkative(folder / "site", registry.url, 2) as nodes,
    ):
        right, wrong = (
            "Basic " + base64.b64encode(f"{ALICE}:{password}".encode()).decode()
            for password in (PASSWORDS[ALICE], "guess-of-mallory")
        )
        assert is_refused(nodes[0], image)
        assert ask(nodes[0], PRIVATE, f"manifests/{TAG}").headers["www-authenticate"] == 'Basic realm="registry"'
        read_all(nodes[0], image, right)
        for node in nodes:
            assert is_refused(node, image)
            assert is_refused(node, image, wrong)
        read_all(nodes[1], image, right)
        for node in nodes:
            assert_silent(node, [PASSWORDS[ALICE], right.split()[1], wrong.split()[1]])


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("containerd") or not shutil.which("ctr"),
    reason="containerd needs to be installed, and root to run it",
)
def test_containerd_pulls_a_private_image_through_the_mirror(folder: Path, image: Image, guarded: Guarded) -> None:
    reference = f"{UPSTREAM}/{PRIVATE}:{TAG}"
    with ExitStack() as stack:
        nodes = stack.enter_context(site(folder / "site", guarded.proxy.url, 2))
        engines = [stack.enter_context(containerd(folder / f"engine-{i}")) for i in (1, 2)]
        for engine, node in zip(engines, nodes, strict=True):
            engine.use_mirror(UPSTREAM, "http://127.0.0.1:9", node.mirror)
            assert engine.pull(reference).returncode != 0
            assert engine.pull(reference, user=f"{BOB}:{PASSWORDS[BOB]}").returncode != 0
            pulled = engine.pull(reference, user=f"{ALICE}:{PASSWORDS[ALICE]}")
            assert pulled.returncode == 0, pulled.stdout + pulled.stderr
        assert guarded.proxy.count.received <= MAX_COPIES * image.size, guarded.proxy.count.asked.most_common(5)


def secrets_of(authorization: str) -> list[str]:
    """The parts of a token that differ from token to token: its claims and its signature."""
    return authorization.removeprefix("Bearer ").split(".")[1:]


def assert_silent(node: Node, secrets: list[str]) -> None:
    """Check that none of these secrets is in the node's output, log or files."""
    metrics = re.search(r'metrics = "(.+)"', node.config.read_text())
    assert metrics is not None
    said = {
        "metrics": httpx.get(f"http://{metrics[1]}/metrics", trust_env=False).content,
        "why": node.ctl("why", f"{UPSTREAM}/{PRIVATE}:{TAG}", "--json", "--blocks").stdout.encode(),
        "images": node.ctl("images", "--json").stdout.encode(),
        "status": json.dumps(node.status()).encode(),
        "log": node.log.read_bytes(),
        **{str(path): path.read_bytes() for path in node.data.rglob("*") if path.is_file()},
    }
    assert b'"objects"' in said["why"]
    assert b"msg=ready" in said["log"]
    for secret in secrets:
        for where, content in said.items():
            assert secret.encode() not in content, where
