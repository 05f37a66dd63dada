"""Every supported client pulls an image of two platforms through the mirror, configured with its file from deploy/.

Even if the mirror fails, the client ends with the image as the registry has it. Clients differ in their recovery from
a failure, and in whether they show a mirror their credentials: RESUMES, GIVES_UP and SHOWS.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import image as images
from tests.support import registry as registries
from tests.support.engines import DEBIAN, ENGINES, PROGRAMS, Engine, Held
from tests.support.hub import NAME, Hub, hub
from tests.support.image import Image
from tests.support.processes import free_ports, wait_for
from tests.support.proxy import CountingProxy
from tests.support.pull import PullFailedError
from tests.support.registry import Registry
from tests.support.site import Node, site
from tests.support.token_server import TokenServer

REPOSITORY, TAG = "demo/app", "v1"
REFERENCE = f"{NAME}/{REPOSITORY}:{TAG}"
ALICE, BOB = "alice", "bob"
PASSWORDS = {ALICE: "correct-horse-battery", BOB: "bobs-own-password"}
MAX_COPIES = 1.05
UPLINK = 4 << 20
"""Bytes per second: slow enough to kill a node in the middle of a layer."""

RESUMES = {"containerd", "buildkit"}
"""Clients that request the rest of a layer from the registry if the mirror breaks off."""
GIVES_UP = {"skopeo", "podman", "buildah"}
"""Clients whose pull fails if the mirror breaks off. Their next pull goes to the registry."""
SHOWS = {"containerd", "buildkit"}
"""Clients that pull private images through the mirror, with a token. The others pull them from the registry."""

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mount namespaces and these clients' stores need root"),
    pytest.mark.skipif(not registries.installed(), reason="docker-registry is not installed: run .ci/packages as root"),
]


def need(engine: str) -> None:
    absent = [program for program in PROGRAMS[engine] if shutil.which(program, path=DEBIAN) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}; run .ci/packages as root")


@pytest.fixture(params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    engine: str = request.param
    need(engine)
    return engine


@dataclass(frozen=True, slots=True)
class Published:
    """`image` in the stored registry. `truth` is the image unpacked without a mirror; `size` counts all platforms."""

    stored: Path
    image: Image
    size: int
    truth: Held

    def check(self, held: Held) -> None:
        shown = {self.image.index.digest, self.image.config.digest}
        assert (
            shown
            <= held.digests
            <= {blob.digest for blob in (self.image.index, self.image.manifest, *self.image.blobs)}
        )
        assert held.tree == self.truth.tree


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    need("skopeo")
    folder = tmp_path_factory.mktemp("published")
    other = images.build(folder / "other", [[("marker", b"the wrong platform")]], architecture="riscv64")
    layers = [images.shell_root(), [("opt/noise", images.noise(1, 6_000_001))], [("etc/os-release", b"the upper one")]]
    image = images.with_platforms_of(images.build(folder / "image", layers), other)
    stored = folder / "stored"
    with registries.docker_registry(stored) as registry:
        registries.push(registry, other, REPOSITORY, "other")
        registries.push(registry, image, REPOSITORY, TAG)
        with (
            hub(folder / "hub", registry.host, registry.port) as direct,
            ENGINES["skopeo"](folder / "truth", direct, "") as skopeo,
        ):
            skopeo.pull(REFERENCE).wait()
            truth = skopeo.held(REFERENCE)
    return Published(stored, image, image.size + other.size, truth)


@pytest.fixture(scope="module")
def registry(published: Published) -> Iterator[Registry]:
    with registries.docker_registry(published.stored) as running:
        yield running


@dataclass(frozen=True, slots=True)
class Pair:
    """Two nodes, and the proxy in front of their registry."""

    nodes: list[Node]
    proxy: CountingProxy


@pytest.fixture(scope="module")
def pair(registry: Registry) -> Iterator[Pair]:
    with (
        tempfile.TemporaryDirectory(prefix="shoal-") as folder,
        CountingProxy(registry.host, registry.port) as proxy,
        site(Path(folder), proxy.url, 2, upstream=NAME) as nodes,
    ):
        yield Pair(nodes, proxy)


@pytest.fixture
def direct(registry: Registry, folder: Path) -> Iterator[Hub]:
    """docker.io for the clients. It counts the bytes that do not pass through the mirror."""
    with hub(folder / "hub", registry.host, registry.port) as running:
        yield running


def at(node: Node) -> str:
    return f"{node.host}:{node.mirror_port}"


def test_all_pull_by_tag_and_by_digest_from_two_nodes_and_the_registry_gives_one_copy(
    folder: Path, published: Published, pair: Pair, direct: Hub, name: str
) -> None:
    """The registry sends one copy of each blob to all clients of this module together."""
    references = (REFERENCE, f"{NAME}/{REPOSITORY}@{published.image.index.digest}")
    for node, reference in zip(pair.nodes, references, strict=True):
        with ENGINES[name](folder / f"at-{node.name}", direct, at(node)) as engine:
            engine.pull(reference).wait()
            published.check(engine.held(reference))
    assert pair.proxy.count.received <= MAX_COPIES * published.size, pair.proxy.count.asked.most_common(5)
    assert direct.proxy.count.connections == 0


def test_a_dead_mirror_breaks_no_pull(folder: Path, published: Published, direct: Hub, name: str) -> None:
    (port,) = free_ports("127.0.0.1", 1)
    with ENGINES[name](folder / "engine", direct, f"127.0.0.1:{port}") as engine:
        engine.pull(REFERENCE).wait()
        published.check(engine.held(REFERENCE))
    assert direct.proxy.count.received <= MAX_COPIES * published.size, direct.proxy.count.asked.most_common(5)


def test_a_mirror_that_is_killed_in_the_middle_of_a_layer(
    folder: Path, published: Published, registry: Registry, direct: Hub, name: str
) -> None:
    with (
        CountingProxy(registry.host, registry.port, rate=UPLINK) as slow,
        site(folder / "site", slow.url, 1, upstream=NAME) as (node,),
        ENGINES[name](folder / "engine", direct, at(node)) as engine,
    ):
        pull = engine.pull(REFERENCE)
        wait_for("half of the image is pulled", lambda: slow.count.received > published.size / 2)
        node.kill()
        try:
            pull.wait()
        except PullFailedError:
            assert name in GIVES_UP
            engine.pull(REFERENCE).wait()
        published.check(engine.held(REFERENCE))
        assert any(" bytes=" in asked for asked in direct.proxy.count.asked) == (name in RESUMES)


def test_only_a_permitted_user_gets_a_private_image(
    folder: Path, published: Published, tmp_path: Path, name: str
) -> None:
    with ExitStack() as stack:
        tokens = stack.enter_context(TokenServer(tmp_path, PASSWORDS, {ALICE: [REPOSITORY]}))
        registry = stack.enter_context(registries.docker_registry(published.stored, auth=tokens.registry_auth()))
        proxy = stack.enter_context(CountingProxy(registry.host, registry.port))
        direct = stack.enter_context(hub(folder / "hub", registry.host, registry.port))
        (node,) = stack.enter_context(site(folder / "site", proxy.url, 1, upstream=NAME))
        engine = stack.enter_context(ENGINES[name](folder / "engine", direct, at(node)))
        assert_refused(engine, "")
        assert_refused(engine, f"{BOB}:{PASSWORDS[BOB]}")
        engine.pull(REFERENCE, f"{ALICE}:{PASSWORDS[ALICE]}").wait()
        published.check(engine.held(REFERENCE))
        layers = sum(layer.size for layer in published.image.layers)
        past, through = (counting.count.received > layers for counting in (direct.proxy, proxy))
        assert (through, past) == (name in SHOWS, name not in SHOWS)


def assert_refused(engine: Engine, user: str) -> None:
    with pytest.raises(PullFailedError):
        engine.pull(REFERENCE, user).wait()
