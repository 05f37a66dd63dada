"""The versions of a tag that the nodes of a site see while it moves and the registry comes and goes. Virtual time."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random

import pytest
import trio

from cache.store import READ_HERE
from node.config.schema import config_of, tag_policies
from node.content.name_table import NameTable
from node.exchange.memory import MemoryNetwork
from node.oci.manifests import Resolved
from node.oci.references import Grant, Locator
from protocol.errors import NotFoundError, UnavailableError
from protocol.ids import Digest, ObjectRef
from protocol.messages import Resolve
from tests.support import site_in_memory
from tests.support.names_in_memory import APP, EPOCH, MAX_AGE_S, TTL_S, Node, Registry, manifest, play


@pytest.mark.parametrize(("answer_s", "latency_s"), [(0.02, 0.005), (7.0, 0.005), (0.02, 0.9)])
def test_a_moved_tag_is_seen_within_its_time_to_live_by_every_node(
    tmp_path: Path, answer_s: float, latency_s: float
) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        registry.answer_s, network.latency_s = answer_s, latency_s
        rng = Random(3)

        async def client(node: Node) -> None:
            seen = 0
            while trio.current_time() < 20 * TTL_S:
                asked = trio.current_time()
                version = await node.version()
                due = [number for at, number in registry.moved if at <= asked - TTL_S][-1:]
                assert version >= max([seen, *due]), "the version is too old, or older than an earlier answer"
                seen = version
                await trio.sleep(rng.uniform(0, TTL_S / 3))

        async with trio.open_nursery() as clients:
            for node in nodes:
                clients.start_soon(client, node)
            for _ in range(12):
                await trio.sleep(rng.uniform(0, 3 * TTL_S))
                registry.move()

    play(tmp_path, 5, scenario)


def test_a_site_asks_once_in_a_time_to_live(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        for _ in range(100):
            for node in nodes:
                assert await node.version() == 1
            await trio.sleep(TTL_S / 10)
        assert registry.asked <= 12

    play(tmp_path, 5, scenario)


def test_nodes_agree_on_the_youngest_answer_while_the_registry_is_out_of_reach(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        assert [await node.version() for node in nodes] == [1] * 5
        await trio.sleep(2 * TTL_S)
        registry.move()
        home = nodes[0].site.placement().name_homes(f"{APP}@latest")[0]
        other = next(node for node in nodes if node.own != home)
        registry.cut = {node.own for node in nodes} - {other.own}
        assert await other.version() == 2, "the tag's home does not reach the registry, but this node does"
        registry.cut.add(other.own)
        await trio.sleep(2 * TTL_S)
        assert [await node.version() for node in nodes] == [2] * 5
        assert {node.row("latest")[0] for node in nodes if node.own != other.own} == {"stale"}
        await trio.sleep(MAX_AGE_S)
        for node in nodes:
            with pytest.raises(UnavailableError):
                await node.version()
        assert nodes[0].row("latest")[0] == "too old"
        registry.cut.clear()
        assert [await node.version() for node in nodes] == [2] * 5

    play(tmp_path, 5, scenario)


def test_a_tag_that_the_registry_deleted_stays_deleted_while_the_registry_is_down(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        assert [await node.version() for node in nodes] == [1] * 5
        await trio.sleep(2 * TTL_S)
        registry.deleted = True
        for node in nodes:
            with pytest.raises(NotFoundError):
                await node.version()
        registry.cut = {node.own for node in nodes}
        for node in nodes:
            with pytest.raises(UnavailableError):
                await node.version()

    play(tmp_path, 5, scenario)


@pytest.mark.parametrize("by_digest", [False, True])
def test_the_registry_is_asked_for_a_size_after_a_members_size_failed(tmp_path: Path, by_digest: bool) -> None:
    """S-25."""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        body = manifest(1)
        right = ObjectRef(Digest("sha256", sha256(body).hexdigest()), len(body))
        reference = str(right.digest) if by_digest else "latest"
        home = nodes[0].site.placement().name_homes(f"{APP}@{reference}")[0]
        reader = next(node for node in nodes if node.own != home)
        next(node for node in nodes if node.own == home).lies = True
        answer = await reader.names.resolve(APP, reference)
        assert answer.ref == replace(right, size=right.size + 1)
        reader.names.known.doubt(APP, answer.ref)
        for _ in range(2):
            assert (await reader.names.resolve(APP, reference)).ref == right

    play(tmp_path, 5, scenario)


@pytest.mark.parametrize("lie", ["type", "size"])
def test_a_members_answer_about_a_manifest_is_compared_with_its_bytes(
    tmp_path: Path, lie: str, caplog: pytest.LogCaptureFixture
) -> None:
    """S-25"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        reader, media_type = nodes[0], "application/vnd.oci.image.manifest.v1+json"
        body = json.dumps({"mediaType": media_type, "layers": []}).encode()
        right = Resolved(ObjectRef(Digest("sha256", sha256(body).hexdigest()), len(body)), media_type)
        false = replace(right, media_type="application/vnd.oci.image.index.v1+json")
        if lie == "size":
            false = replace(right, ref=replace(right.ref, size=right.ref.size + 1))
        await reader.blocks.home.admit(APP, right.ref, body, kept_for=READ_HERE)
        reader.table.put(str(APP), "latest", false, "a liar")
        down = site_in_memory.Registry()
        down.down, reader.registry.target = True, down
        library = reader.library_with(reader.names)
        for _ in range(2):
            resolved = await library.resolve(APP, "latest")
            assert (resolved.ref, resolved.media_type) == (right.ref, media_type)
        assert registry.asked == 0, "bytes that were verified decide"
        if lie == "type":
            (line,) = [record.getMessage() for record in caplog.records if "is of type" in record.getMessage()]
            assert line.endswith(f"is of type {media_type}; a liar sent {false.media_type}")
            answer = await reader.names.handle(reader.own, Resolve(str(APP), "latest", 1))
            assert answer.message.media_type == media_type, "members get the type of the bytes"

    play(tmp_path, 1, scenario)


def test_an_offline_site_asks_itself_once_in_a_time_to_live(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await nodes[0].version()
        registry.cut = {node.own for node in nodes}
        await trio.sleep(2 * TTL_S)
        for node in nodes:
            node.heard.clear()
        for _ in range(50):
            await nodes[0].version()
            await trio.sleep(TTL_S / 60)
        members, rounds = len(nodes) - 1, 50
        asked = sum(len(node.heard) for node in nodes)
        assert asked <= 2 * 2 * members + rounds, "each resolve asks its home, and only few ask all members"

    play(tmp_path, 5, scenario)


def test_a_tag_that_is_never_cached_is_asked_for_each_time_and_not_served_offline(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        for _ in range(3):
            for node in nodes:
                registry.move()
                before = registry.asked
                assert await node.version("edge") == registry.moved[-1][1]
                assert registry.asked == before + 1
        registry.cut = {node.own for node in nodes}
        for node in nodes:
            with pytest.raises(UnavailableError):
                await node.version("edge")
        assert nodes[0].row("edge")[0] == "too old"
        assert nodes[0].row("edge")[2] == "*:edge"

    play(tmp_path, 5, scenario)


def test_tags_show_the_source_and_the_age_of_each_answer(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        for node in nodes:
            await node.version("quick")
        home = nodes[0].site.placement().name_homes(f"{APP}@quick")[0]
        rows = {node.own: node.row("quick") for node in nodes}
        assert rows.pop(home) == ("fresh", "registry", "*:quick")
        assert set(rows.values()) == {("fresh", home, "*:quick")}
        await trio.sleep(6)
        assert nodes[0].row("quick")[0] == "due"
        await nodes[0].version()
        assert [row.tag for row, _, _ in nodes[0].names.known.tags("origin.test/*")] == ["latest", "quick"]
        assert nodes[0].names.known.tags("docker.io/*") == []
        again = NameTable(tmp_path / f"{nodes[0].own}.sqlite", lambda: EPOCH + trio.current_time())
        assert {row.told_by for row in again.tags("*")} == {""}
        again.close()

    play(tmp_path, 5, scenario)


def test_a_digest_that_one_member_knows_is_found_while_the_registry_is_out_of_reach(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        registry.cut = {node.own for node in nodes}
        digest = f"sha256:{sha256(manifest(1)).hexdigest()}"
        for _ in range(2):
            with pytest.raises(UnavailableError):
                await nodes[0].version(digest)
        registry.cut = {node.own for node in nodes} - {nodes[4].own}
        resolved = (await nodes[4].reached.resolve(APP, digest))[0]
        nodes[4].table.put(str(APP), digest, resolved)
        registry.cut.add(nodes[4].own)
        assert [await node.version(digest) for node in nodes] == [1] * 5

    play(tmp_path, 5, scenario)


def test_a_tag_that_appears_on_one_member_of_an_offline_site_is_found_at_once(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        resolved = (await nodes[0].reached.resolve(APP, "latest"))[0]
        registry.cut = {node.own for node in nodes}
        for node in nodes:
            with pytest.raises(UnavailableError):
                await node.version()
        nodes[4].table.put(str(APP), "latest", resolved)
        assert [await node.version() for node in nodes] == [1] * 5

    play(tmp_path, 5, scenario)


def test_a_tag_that_the_registry_lacks_is_an_error_on_every_node(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        for node in nodes:
            with pytest.raises(NotFoundError):
                await node.names.resolve(APP, "none")

    play(tmp_path, 3, scenario)


def test_homes_that_die_cost_no_answer(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        homes = nodes[0].site.placement().name_homes(f"{APP}@latest")
        for home in homes[:2]:
            network.kill(home)
        for node in nodes:
            if node.own not in homes[:2]:
                with trio.fail_after(10):
                    assert await node.version() == 1

    play(tmp_path, 5, scenario)


# The policy


def test_the_first_matching_pattern_decides_the_policy() -> None:
    rules = [
        {"match": "docker.io/library/*:latest", "ttl": "5s"},
        {"match": "docker.io/*", "max_age": "1h"},
        {"match": "*:edge", "cache": False},
    ]
    policies = tag_policies(config_of({"mirror": {"tag_ttl": "60s", "tag_max_age": "7d"}, "tags": rules}))

    def of(upstream: str, repository: str, tag: str) -> tuple[float, float]:
        policy = policies.of(Locator(upstream, repository, "manifests"), tag)
        assert policy.cached == bool(policy.ttl_s)
        return policy.ttl_s, policy.max_age_s

    assert of("docker.io", "library/alpine", "latest") == (5, 7 * 86400)
    assert of("registry-1.docker.io", "library/a/b", "latest") == (5, 7 * 86400)
    assert of("docker.io", "library/alpine", "edge") == (60, 3600)
    assert of("ghcr.io", "a/b", "edge") == (0, 0)
    assert of("ghcr.io", "a/b", "latest") == (60, 7 * 86400)
    assert of("ghcr.io", "a/b", "latest") == (60, 7 * 86400)


def test_a_read_with_a_grant_asks_no_other_node(tmp_path: Path) -> None:
    """S-27"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        granted = replace(APP, grant=Grant("Bearer of-alice"))
        assert await nodes[0].version() == 1
        home = nodes[0].site.placement().name_homes(f"{APP}@latest")[0]
        other = next(node for node in nodes[1:] if node.own != home)
        for node in nodes:
            node.heard.clear()
        registry.cut.add(other.own)
        with pytest.raises(UnavailableError):
            await other.names.resolve(granted, "latest")
        registry.cut.clear()
        asked = registry.asked
        async with trio.open_nursery() as clients:
            for client in ("alice", "bob"):
                locator = replace(APP, grant=Grant(f"Bearer of-{client}"))
                clients.start_soon(other.names.resolve, locator, "latest")
        assert registry.asked == asked + 2, "two clients' grants share no answer"
        assert not any(node.heard for node in nodes)

    play(tmp_path, 5, scenario)
