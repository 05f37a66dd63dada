"""The main purpose: for any number of nodes that pull an image at once, the registry sends each byte about once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.clients import REPOSITORY, TAG, pull_through
from tests.support.image import Image
from tests.support.proxy import CountingProxy
from tests.support.pull import pull_with_skopeo, verify
from tests.support.site import UPSTREAM, Node, site

MAX_COPIES = 1.05


def copies(proxy: CountingProxy, image: Image) -> float:
    return proxy.count.received / image.size


def served(node: Node) -> int:
    return sum(node.status()["bytes_served"].values())


def test_five_nodes_pull_at_once_and_the_registry_gives_one_copy(
    folder: Path, image: Image, proxy: CountingProxy
) -> None:
    with site(folder / "site", proxy.url) as nodes:
        pull_through(nodes, folder / "out", image)
        assert copies(proxy, image) <= MAX_COPIES, proxy.count.asked.most_common(5)
        for node in nodes:
            status = node.status()
            assert {"memory", "disk", "containerd", "peer", "origin"} <= status["bytes_served"].keys()
            assert served(node) >= image.size - image.index.size
        assert sum(node.status()["origin_bytes"] for node in nodes) <= proxy.count.received


def test_a_second_pull_asks_the_registry_for_no_blob(folder: Path, image: Image, proxy: CountingProxy) -> None:
    with site(folder / "site", proxy.url) as nodes:
        pull_through(nodes[:1], folder / "first", image)
        proxy.reset()
        pull_through(nodes, folder / "second", image)
        assert copies(proxy, image) <= 0.01, proxy.count.asked.most_common(5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_small_sites_pull_too(folder: Path, image: Image, proxy: CountingProxy, count: int) -> None:
    with site(folder / "site", proxy.url, count) as nodes:
        pull_through(nodes, folder / "out", image)
        assert copies(proxy, image) <= MAX_COPIES, proxy.count.asked.most_common(5)


def test_a_mirror_in_registries_conf_serves_by_tag_and_by_digest(
    folder: Path, image: Image, proxy: CountingProxy
) -> None:
    with site(folder / "site", proxy.url, 1) as (node,):
        conf = folder / "registries.conf"
        conf.write_text(
            f'[[registry]]\nprefix = "{UPSTREAM}"\nlocation = "{UPSTREAM}"\ninsecure = true\n'
            f'[[registry.mirror]]\nlocation = "{node.host}:{node.mirror_port}/{UPSTREAM}"\ninsecure = true\n'
        )
        for name, reference in (("tag", TAG), ("digest", image.index.digest)):
            repository = REPOSITORY.removeprefix(f"{UPSTREAM}/")
            pull = pull_with_skopeo(UPSTREAM, repository, reference, folder / name, registries_conf=conf)
            pull.wait()
            verify(pull.folder, image)
