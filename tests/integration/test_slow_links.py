"""Four of five nodes on links of 20 Mbit/s pull a cold image at once. In one case the fifth node is slow."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.support import image as images
from tests.support import registry as registries
from tests.support.lab import WAN, Lab, NoLabError, Rates, check_lab, lab
from tests.support.lab_client import Client
from tests.support.proxy import CountingProxy
from tests.support.site import UPSTREAM, site

REPOSITORY = "demo/app"
NODES, PULLING, RATE = 5, 4, 20e6
LAYERS = (3_000_000, 5_000_000)
SLOWER = 50


@pytest.fixture
def slow_site() -> Iterator[Lab]:
    try:
        check_lab()
    except NoLabError as error:
        pytest.skip(str(error))
    with lab(NODES, Rates(RATE, RATE)) as made:
        yield made


@pytest.mark.parametrize("is_slow", [False, True], ids=["all equal", "one slow"])
def test_a_crowd_on_slow_links_gets_its_image_and_asks_the_registry_for_it_once(
    folder: Path, slow_site: Lab, is_slow: bool
) -> None:
    image = images.build(
        folder / "image", [[(f"noise-{size}", images.noise(number, size))] for number, size in enumerate(LAYERS)]
    )
    with registries.docker_registry(folder / "registry") as registry:
        registries.push(registry, image, REPOSITORY, "v1")
    with (
        registries.docker_registry(folder / "registry", slow_site.wan) as registry,
        CountingProxy(registry.host, registry.port, namespace=slow_site.wan, listen=WAN) as proxy,
        site(folder / "site", proxy.url, NODES, lab=slow_site) as nodes,
    ):
        if is_slow:
            slow_site.set_node_rate(NODES - 1, RATE / SLOWER)

        async def crowd() -> None:
            async with trio.open_nursery() as nursery:
                for node, namespace in list(zip(nodes, slow_site.nodes, strict=True))[:PULLING]:
                    connect = partial(namespace.connect, node.host, node.mirror_port)
                    nursery.start_soon(Client(connect, f"{UPSTREAM}/{REPOSITORY}", "v1").pull)

        trio.run(crowd)  # raises if a body stalls until the server cuts it
        assert proxy.count.received < (1.6 if is_slow else 1.05) * image.size
