"""A small real image in a real registry, shared by all integration tests. Each test makes its own site and proxy."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import image as images
from tests.support import registry as registries
from tests.support.processes import scratch
from tests.support.proxy import CountingProxy

REPOSITORY = "demo/app"
TAG = "v1"
NOISE_BYTES = 17_000_001
"""Incompressible bytes, not a whole number of blocks."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for unix sockets; the paths of pytest's folders are too long."""
    with scratch() as path:
        yield path


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> images.Image:
    """Three layers: a root file system that runs, incompressible bytes, and Python's library."""
    library = Path(sysconfig.get_path("stdlib"))

    def source(path: Path) -> bool:
        skipped = {"site-packages", "dist-packages", "test", "tests", "lib-dynload"}
        return path.suffix == ".py" and not skipped & set(path.parts)

    layers = [
        images.shell_root(),
        [("opt/noise", images.noise(1, NOISE_BYTES))],
        images.tree(library, "usr/local/lib/python3", source),
    ]
    return images.build(tmp_path_factory.mktemp("image") / "layout", layers)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory, image: images.Image) -> Iterator[registries.Registry]:
    if not registries.installed():
        pytest.skip("docker-registry is not installed: run .ci/packages as root")
    with registries.docker_registry(tmp_path_factory.mktemp("registry")) as running:
        registries.push(running, image, REPOSITORY, TAG)
        yield running


@pytest.fixture
def proxy(registry: registries.Registry) -> Iterator[CountingProxy]:
    with CountingProxy(registry.host, registry.port) as counting:
        yield counting


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, if the machine has one: tests open their files there thousands of times."""
    memory = Path("/dev/shm")
    with scratch(parent=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield folder
