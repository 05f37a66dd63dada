"""A real containerd pulls through the mirror that its hosts.toml names, and the container runs."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.clients import REPOSITORY, TAG, pull_through
from tests.support.containerd import containerd
from tests.support.image import Image
from tests.support.proxy import CountingProxy
from tests.support.registry import Registry
from tests.support.site import UPSTREAM, site

REFERENCE = f"{REPOSITORY}:{TAG}"
DEAD_SERVER = "http://127.0.0.1:9"
"""The discard port does not answer: an image pulled with this server came through the mirror."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("containerd") or not shutil.which("ctr"),
    reason="containerd needs to be installed, and root to run it",
)


def test_containerd_pulls_through_the_mirror_and_the_container_runs(
    folder: Path, image: Image, proxy: CountingProxy
) -> None:
    with ExitStack() as stack:
        nodes = stack.enter_context(site(folder / "site", proxy.url))
        engines = [stack.enter_context(containerd(folder / f"engine-{i}")) for i in (1, 2)]
        for engine, node in zip(engines, nodes, strict=False):
            engine.use_mirror(UPSTREAM, DEAD_SERVER, node.mirror)
        with ThreadPoolExecutor(len(engines)) as pool:
            for pulled in pool.map(lambda engine: engine.pull(REFERENCE), engines):
                assert pulled.returncode == 0, pulled.stdout + pulled.stderr
        assert proxy.count.received <= 1.05 * image.size, proxy.count.asked.most_common(5)
        ran = engines[0].run(REFERENCE, "/bin/sh", "-c", "cat /etc/os-release && echo it runs")
        assert ran.returncode == 0, ran.stderr
        assert "it runs" in ran.stdout


def test_an_image_that_containerd_holds_is_neither_fetched_nor_stored(
    folder: Path, image: Image, proxy: CountingProxy, registry: Registry
) -> None:
    with containerd(folder / "engine") as engine:
        engine.use_mirror(UPSTREAM, registry.url, registry.url)
        assert engine.pull(REFERENCE).returncode == 0
        with site(folder / "site", proxy.url, 1, containerd_store=engine.content_store) as (node,):
            pull_through([node], folder / "out", image)
            layers = sum(layer.size for layer in image.layers)
            status = node.status()
            assert status["bytes_served"]["containerd"] >= layers
            assert proxy.count.received < 0.01 * image.size
            assert status["cache"]["disk"]["bytes"] < 0.01 * image.size
