"""What a site asks the registry for names: the shipped nodes over HTTP in virtual time, with the registry's count."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from protocol.errors import UnavailableError
from simulations.cluster import Cluster
from simulations.registry import Image, Registry, locator
from simulations.run import play as run
from simulations.scenario import SITE, Setting, pull_once, running

TTL_S = 60.0
"""The default of mirror.tag_ttl."""
PATH = "/v2/app/manifests/"
APP = locator("manifests")


def play(nodes: int, scenario: Callable[[Cluster, Registry], Awaitable[None]]) -> None:
    setting = Setting(nodes=nodes)

    async def main() -> None:
        registry = setting.registry()
        cluster = setting.cluster(registry, lambda count: None)
        async with running(cluster):
            await scenario(cluster, registry)

    run(1, main)


def test_a_site_of_20_with_10_tags_asks_once_a_node_and_tag_and_reads_each_manifest_once() -> None:
    """S-25"""
    nodes, tags, periods, clients = 20, 10, 3, 4

    async def scenario(cluster: Cluster, registry: Registry) -> None:
        images = [registry.push(f"v{number}", [1000]) for number in range(tags)]

        async def client(number: int, image: Image) -> None:
            until = trio.current_time() + periods * TTL_S
            while trio.current_time() < until:
                resolved = await cluster.nodes[number].library.resolve(APP, image.tag)
                assert resolved.ref == image.manifest
                await trio.sleep(TTL_S / 7)

        async with trio.open_nursery() as nursery:
            for number in range(nodes):
                for image in images:
                    for _ in range(clients):
                        nursery.start_soon(client, number, image)
        heads = [registry.methods[f"HEAD {PATH}{image.tag}"] for image in images]
        assert max(heads) <= nodes * periods
        assert min(heads) >= nodes
        gets = {what: count for what, count in registry.methods.items() if what.startswith("GET ")}
        assert gets == {f"GET {PATH}{image.manifest.digest}": 1 for image in images}
        assert registry.methods.total() == sum(heads) + tags

    play(nodes, scenario)


def test_a_moved_tag_is_seen_on_every_node_within_its_time_to_live() -> None:
    async def scenario(cluster: Cluster, registry: Registry) -> None:
        for version in range(3):
            image = registry.push("latest", [1000 + version])
            moved = trio.current_time()
            for node in cluster.nodes:
                while (await node.library.resolve(APP, "latest")).ref != image.manifest:
                    assert trio.current_time() < moved + TTL_S
                    await trio.sleep(1)

    play(6, scenario)


def test_in_an_outage_pulls_by_tag_and_digest_go_on() -> None:
    async def scenario(cluster: Cluster, registry: Registry) -> None:
        image = registry.push("v1", [100_000])
        nodes = cluster.nodes
        for node in nodes[:2]:
            assert not (await pull_once(node, image)).error
        cluster.network.cut_uplink(SITE)
        for _ in range(3):
            await trio.sleep(2 * TTL_S)
            for node in nodes:
                assert not (await pull_once(node, image)).error
                resolved = await node.library.resolve(APP, str(image.manifest.digest))
                assert resolved.ref == image.manifest
                await node.read(resolved.ref, "manifests")

    play(5, scenario)


def test_in_an_outage_one_member_alone_decides_no_tag_but_serves_its_digest() -> None:
    """S-46"""

    async def scenario(cluster: Cluster, registry: Registry) -> None:
        image = registry.push("v1", [1000])
        first, second, *_ = cluster.nodes
        assert not (await pull_once(first, image)).error
        cluster.network.cut_uplink(SITE)
        with pytest.raises(UnavailableError):
            await second.library.resolve(APP, "v1")
        resolved = await second.library.resolve(APP, str(image.manifest.digest))
        await second.read(resolved.ref, "manifests")
        for layer in image.layers:
            await second.read(layer)

    play(5, scenario)
