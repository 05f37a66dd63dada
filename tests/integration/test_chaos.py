"""A short chaos run with a fixed seed; `make chaos` runs a long one."""

from __future__ import annotations

import pytest

from tests.chaos.run import Settings, run
from tests.support import registry as registries
from tests.support.lab import NoLabError, check_lab


def test_a_site_survives_faults() -> None:
    """S-68: two liars in eight, a partition, a paused daemon, and a restart of all daemons with empty caches."""
    try:
        check_lab()
    except NoLabError as error:
        pytest.skip(str(error))
    if not registries.installed():
        pytest.skip("docker-registry is not installed: run .ci/packages as root")
    assert run(Settings(seed=81, seconds=45, nodes=8, liars=2)) == []
