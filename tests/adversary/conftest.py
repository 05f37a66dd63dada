"""Attacks on real daemons. A module shares a site; a test leaves it able to serve the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import registry as registries
from tests.support.processes import scratch
from tests.support.siege import Siege, besieged


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for unix sockets; the paths of pytest's folders are too long."""
    with scratch() as path:
        yield path


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[registries.Registry]:
    if not registries.installed():
        pytest.skip("docker-registry is not installed: run .ci/packages as root")
    with registries.docker_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def siege(registry: registries.Registry) -> Iterator[Siege]:
    """Four honest daemons and a liar. Tags are asked for anew after a second."""
    with scratch() as folder, besieged(folder, registry, changes={"[mirror]": '[mirror]\ntag_ttl = "1s"'}) as made:
        yield made


@pytest.fixture(autouse=True)
def truthful(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test of the shared site the liar is honest and in good standing, and the registry answers."""
    yield
    if "siege" in request.fixturenames:
        siege: Siege = request.getfixturevalue("siege")
        siege.lies()
        siege.proxy.restore()
        siege.renew_liar()
