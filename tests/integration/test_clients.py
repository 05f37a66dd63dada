"""Every client that operators have pulls one image of two platforms, configured as deploy/ says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import engines
from tests.support import image as images
from tests.support import registry as registries
from tests.support.engines import ENGINES, Held, Start
from tests.support.hub import NAME, Hub, hub
from tests.support.image import Image
from tests.support.processes import free_ports, wait_for
from tests.support.proxy import CountingProxy
from tests.support.registry import Registry
from tests.support.site import site

REPOSITORY, TAG = "demo/app", "v1"
REFERENCE = f"{NAME}/{REPOSITORY}:{TAG}"
UPLINK = 4 << 20
"""Bytes per second: slow enough for a node to die in the middle of a layer."""


def missing(engine: str) -> list[str]:
    return [program for program in engines.PROGRAMS[engine] if shutil.which(program, path=engines.DEBIAN) is None]


@dataclass(frozen=True, slots=True)
class Published:
    """An image of two platforms, of which `image` is this machine's."""

    image: Image
    other: Image
    registry: Registry
    truth: Held

    @property
    def size(self) -> int:
        return self.image.size + self.other.size


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("published")
    other = images.build(folder / "other", [[("marker", b"the wrong platform")]], architecture="riscv64")
    layers = [images.shell_root(), [("opt/noise", images.noise(1, 6_000_001))], [("etc/os-release", b"the upper one")]]
    image = images.with_platforms_of(images.build(folder / "image", layers), other)
    with registries.docker_registry(folder / "registry") as registry:
        registries.push(registry, other, REPOSITORY, "other")
        registries.push(registry, image, REPOSITORY, TAG)
        with hub(folder / "hub", registry.host, registry.port) as direct, ENGINES["skopeo"](folder / "truth", direct, "") as skopeo:
            skopeo.pull(REFERENCE).wait()
            yield Published(image, other, registry, skopeo.held(REFERENCE))


@pytest.fixture
def direct(published: Published, folder: Path) -> Iterator[Hub]:
    with hub(folder / "hub", published.registry.host, published.registry.port) as running:
        yield running


@pytest.fixture(params=ENGINES)
def start(request: pytest.FixtureRequest) -> Start:
    if absent := missing(request.param):
        pytest.skip(f"{', '.join(absent)}: run .ci/packages as root")
    return ENGINES[request.param]


def check(held: Held, published: Published) -> None:
    image = published.image
    told = {one.digest for one in (image.index, image.config)}
    known = {one.digest for one in (image.index, image.manifest, *image.blobs)}
    assert told <= held.digests <= known
    assert held.tree == published.truth.tree


def test_tag_and_digest(folder: Path, published: Published, direct: Hub, start: Start) -> None:
    direct.proxy.cut()
    with ExitStack() as stack:
        proxy = stack.enter_context(CountingProxy(published.registry.host, published.registry.port))
        nodes = stack.enter_context(site(folder / "site", proxy.url, 2, upstream=NAME))
        for node, reference in zip(nodes, (REFERENCE, f"{NAME}/{REPOSITORY}@{published.image.index.digest}")):
            engine = stack.enter_context(start(folder / f"at-{node.name}", direct, f"{node.host}:{node.mirror_port}"))
            engine.pull(reference).wait()
            check(engine.held(reference), published)
        assert proxy.count.received <= 1.05 * published.size, proxy.count.asked.most_common(5)
        assert direct.proxy.count.connections == 0


def test_dead_mirror(folder: Path, published: Published, direct: Hub, start: Start) -> None:
    (port,) = free_ports("127.0.0.1", 1)
    with start(folder / "engine", direct, f"127.0.0.1:{port}") as engine:
        s=engine.pull(REFERENCE).wait()
        print("SECONDS", s)
        check(engine.held(REFERENCE), published)


def test_killed_in_the_middle(folder: Path, published: Published, direct: Hub, start: Start) -> None:
    with (
        CountingProxy(published.registry.host, published.registry.port, rate=UPLINK) as proxy,
        site(folder / "site", proxy.url, 1, upstream=NAME) as (node,),
        start(folder / "engine", direct, f"{node.host}:{node.mirror_port}") as engine,
    ):
        pull = engine.pull(REFERENCE)
        wait_for("half of it is there", lambda: proxy.count.received > published.size / 2)
        node.kill()
        try:
            s=pull.wait()
        finally:
            print(pull._log.read_text())
        print("SECONDS", s, direct.proxy.count)
        check(engine.held(REFERENCE), published)
