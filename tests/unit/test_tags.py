"""The versions of a tag that the nodes of a site see while it moves and the registry comes and goes. Virtual time."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from random import Random

import msgspec
import pytest
import trio

from cache.store import READ_HERE
from node.blocks.held_objects import held_body
from node.config.schema import config_of, tag_policies
from node.config.tag_policy import TagPolicies, TagPolicy
from node.content.name_table import NameTable
from node.content.resolver import ASK_S, LAST_RESORT_MEMBERS
from node.exchange.contract import Answer
from node.exchange.memory import MemoryNetwork
from node.oci.manifests import Resolved
from node.oci.references import Grant, Locator
from protocol import messages
from protocol.errors import NotFoundError, UnavailableError
from protocol.ids import Digest, ObjectRef, PeerId
from protocol.messages import Failed, Request, Resolve
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


@pytest.mark.parametrize(("count", "tags"), [(5, 1), (20, 10)])
def test_every_node_asks_once_for_a_tag_in_a_time_to_live(tmp_path: Path, count: int, tags: int) -> None:
    """S-25"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        async def client(node: Node, tag: str) -> None:
            for _ in range(30):
                assert await node.version(tag) == 1
                await trio.sleep(TTL_S / 10)

        async with trio.open_nursery() as clients:
            for node in nodes:
                for number in range(tags):
                    for _ in range(3):
                        clients.start_soon(client, node, f"v{number}")
        periods = 3
        assert registry.asked <= count * tags * periods
        assert set(registry.asked_by) == {node.own for node in nodes}
        assert max(registry.asked_by.values()) <= tags * periods
        assert not any(node.heard for node in nodes), "nobody asks a member while the registry answers"

    play(tmp_path, count, scenario)


def test_a_nodes_own_last_answer_goes_before_younger_ones_of_others(tmp_path: Path) -> None:
    """S-46"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        assert [await node.version() for node in nodes] == [1] * 5
        await trio.sleep(2 * TTL_S)
        registry.move()
        registry.cut = {nodes[0].own}
        assert [await node.version() for node in nodes] == [1, 2, 2, 2, 2]
        assert nodes[0].row("latest")[:2] == ("stale", "registry")
        assert not any(node.heard for node in nodes)
        registry.cut = {node.own for node in nodes}
        await trio.sleep(MAX_AGE_S)
        for node in nodes:
            with pytest.raises(UnavailableError):
                await node.version()
        assert nodes[0].row("latest")[0] == "too old"
        registry.cut.clear()
        assert [await node.version() for node in nodes] == [2] * 5

    play(tmp_path, 5, scenario)


def test_members_that_agree_help_a_node_without_an_answer(tmp_path: Path) -> None:
    """S-46"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        asking, *others = nodes
        registry.cut = {asking.own}
        assert await others[0].version() == 1
        with pytest.raises(UnavailableError):
            await asking.version()
        await trio.sleep(TTL_S / 2)
        assert await others[1].version() == 1
        assert await asking.version() == 1
        assert asking.row("latest")[:2] == ("stale", "members")
        assert asking.ages[-1] >= TTL_S / 2, "the age is that of the older witness"
        ((row, _, _),) = asking.names.known.tags("*")
        assert set(row.told_by) == {others[0].own, others[1].own}
        # It says nothing to others of what it heard.
        registry.cut = {node.own for node in nodes}
        for node in nodes[1:3]:
            node.handler = unanswering
        with pytest.raises(UnavailableError):
            await others[3].version()
        # The registry's own answer replaces it at once.
        registry.move()
        registry.cut.clear()
        await trio.sleep(TTL_S)
        assert await asking.version() == 2
        assert asking.row("latest")[:2] == ("fresh", "registry")

    play(tmp_path, 5, scenario)


async def unanswering(peer: PeerId, request: Request) -> Answer:
    return Answer(Failed("not-found", "it does not exist"))


def test_members_on_one_host_are_one_witness(tmp_path: Path) -> None:
    """S-46"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        members = [
            msgspec.structs.replace(member, addresses=("192.0.2.9:1",)) if member.peer_id != nodes[0].own else member
            for member in nodes[0].view.site
        ]
        nodes[0].view.replace(members)
        registry.cut = {nodes[0].own}
        for node in nodes[1:]:
            assert await node.version() == 1
        with pytest.raises(UnavailableError):
            await nodes[0].version()

    play(tmp_path, 5, scenario)


@pytest.mark.parametrize("witnesses", [1, 2, 3])
def test_liars_too_few_to_decide_choose_nothing(tmp_path: Path, witnesses: int) -> None:
    """S-46"""
    wrong = "sha256:" + "66" * 32

    async def lie(peer: PeerId, request: Request) -> Answer:
        return Answer(messages.Resolved(wrong, 1, "a/b", 0.0))

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        asking, liars, honest = nodes[0], nodes[1:witnesses], nodes[witnesses:]
        asking.names.known.policies = TagPolicies(TagPolicy("", TTL_S, MAX_AGE_S), witnesses=witnesses)
        registry.cut = {asking.own}
        for liar in liars:
            liar.handler = lie
        for node in honest[: witnesses - 1]:
            await node.version()
        with pytest.raises(UnavailableError):
            await asking.version()
        await honest[witnesses - 1].version()
        assert await asking.version() == 1

    play(tmp_path, 7, scenario)


def test_as_many_liars_as_honest_witnesses_only_prevent_an_answer(tmp_path: Path) -> None:
    """S-46"""

    async def lie(peer: PeerId, request: Request) -> Answer:
        return Answer(messages.Resolved("sha256:" + "66" * 32, 1, "a/b", 0.0))

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        registry.cut = {nodes[0].own}
        for node in nodes[1:3]:
            node.handler = lie
        for node in nodes[3:5]:
            await node.version()
        with pytest.raises(UnavailableError):
            await nodes[0].version()
        await nodes[5].version()
        assert await nodes[0].version() == 1

    play(tmp_path, 6, scenario)


def test_a_member_that_says_that_a_name_is_missing_is_not_believed(tmp_path: Path) -> None:
    """S-47"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        digest = f"sha256:{sha256(manifest(1)).hexdigest()}"
        for node in nodes[1:3]:
            node.handler = unanswering
        assert await nodes[0].version() == await nodes[0].version(digest) == 1
        for node in nodes[3:]:
            await node.version()
        registry.cut = {node.own for node in nodes}
        await trio.sleep(2 * TTL_S)
        assert await nodes[0].version() == await nodes[0].version(digest) == 1
        nodes[0].names.known.forget(APP, "latest")
        assert await nodes[0].version() == 1, "two others agree"

    play(tmp_path, 6, scenario)


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
def test_the_registry_is_asked_for_the_bytes_after_a_size_failed(tmp_path: Path, by_digest: bool) -> None:
    """S-49"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        body = manifest(1)
        right = ObjectRef(Digest("sha256", sha256(body).hexdigest()), len(body))
        reference = str(right.digest) if by_digest else "latest"
        false = Resolved(replace(right, size=right.size + 1), "a/b")
        nodes[0].table.put(str(APP), reference, false)
        assert (await nodes[0].names.resolve(APP, reference)).ref == false.ref
        nodes[0].names.known.doubt(APP, false.ref)
        for _ in range(2):
            assert (await nodes[0].names.resolve(APP, reference)).ref == right
        assert registry.asked == 1
        assert await held_body(nodes[0].tiers, right) == body

    play(tmp_path, 2, scenario)


def test_a_false_size_of_a_member_is_tried_once_in_an_outage(tmp_path: Path) -> None:
    """S-49"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        body = manifest(1)
        right = ObjectRef(Digest("sha256", sha256(body).hexdigest()), len(body))

        async def lie(peer: PeerId, request: Request) -> Answer:
            return Answer(messages.Resolved(str(right.digest), right.size + 1, "a/b", 0.0))

        for node in nodes[1:3]:
            node.handler = lie
        nodes[3].table.put(str(APP), str(right.digest), Resolved(right, "a/b"))
        registry.cut = {node.own for node in nodes}
        false = await nodes[0].names.resolve(APP, str(right.digest))
        assert false.ref.size == right.size + 1, "two say so"
        nodes[0].names.known.doubt(APP, false.ref)
        assert (await nodes[0].names.resolve(APP, str(right.digest))).ref == right

    play(tmp_path, 4, scenario)


@pytest.mark.parametrize("lie", ["type", "size"])
def test_the_claims_about_a_manifest_are_compared_with_its_bytes(
    tmp_path: Path, lie: str, caplog: pytest.LogCaptureFixture
) -> None:
    """S-49"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        reader, media_type = nodes[0], "application/vnd.oci.image.manifest.v1+json"
        body = json.dumps({"mediaType": media_type, "layers": []}).encode()
        right = Resolved(ObjectRef(Digest("sha256", sha256(body).hexdigest()), len(body)), media_type)
        false = replace(right, media_type="application/vnd.oci.image.index.v1+json")
        if lie == "size":
            false = replace(right, ref=replace(right.ref, size=right.ref.size + 1))
        await reader.blocks.home.admit(APP, right.ref, body, kept_for=READ_HERE)
        reader.table.put(str(APP), "latest", false)
        down = site_in_memory.Registry()
        down.down, reader.registry.target = True, down
        library = reader.library_with(reader.names)
        for _ in range(2):
            resolved = await library.resolve(APP, "latest")
            assert (resolved.ref, resolved.media_type) == (right.ref, media_type)
        assert registry.asked == 0, "bytes that were verified decide"
        if lie == "type":
            (line,) = [record.getMessage() for record in caplog.records if "is of type" in record.getMessage()]
            assert line.endswith(f"is of type {media_type}, and not of {false.media_type}")
            answer = await reader.names.handle(reader.own, Resolve(str(APP), "latest"))
            assert answer.message.media_type == media_type, "members get the type of the bytes"

    play(tmp_path, 1, scenario)


def test_an_offline_site_asks_itself_once_in_a_time_to_live(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        for node in nodes[1:3]:
            await node.version()
        registry.cut = {node.own for node in nodes}
        for _ in range(50):
            await nodes[0].version()
            await trio.sleep(TTL_S / 60)
        assert sum(len(node.heard) for node in nodes) == len(nodes) - 1
        await trio.sleep(TTL_S)
        await nodes[0].version()
        assert sum(len(node.heard) for node in nodes) == 2 * (len(nodes) - 1)

    play(tmp_path, 5, scenario)


def test_a_large_site_is_searched_in_parts(tmp_path: Path) -> None:
    """S-46"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        asking, *others = sorted(nodes, key=lambda node: node.own)
        registry.cut = {asking.own}
        for node in others[-2:]:
            await node.version()
        assert await asking.version() == 1

    play(tmp_path, LAST_RESORT_MEMBERS + 8, scenario)


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
        assert {node.row("quick") for node in nodes} == {("fresh", "registry", "*:quick")}
        await trio.sleep(6)
        assert nodes[0].row("quick")[0] == "due"
        await nodes[0].version()
        assert [row.tag for row, _, _ in nodes[0].names.known.tags("origin.test/*")] == ["latest", "quick"]
        assert nodes[0].names.known.tags("docker.io/*") == []
        resolved = nodes[0].table.get(str(APP), "latest")
        assert resolved is not None
        nodes[0].table.put(str(APP), "imported", resolved, "import")
        again = NameTable(tmp_path / f"{nodes[0].own}.sqlite", lambda: EPOCH + trio.current_time())
        assert {row.tag: row.origin for row in again.tags("*")} == {
            "latest": "registry",
            "quick": "registry",
            "imported": "import",
        }
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
        await nodes[4].version(digest)
        registry.cut.add(nodes[4].own)
        assert [await node.version(digest) for node in nodes] == [1] * 5

    play(tmp_path, 5, scenario)


def test_a_tag_that_two_members_imported_is_found_at_once(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        resolved = (await nodes[0].reached.resolve(APP, "latest"))[0]
        registry.cut = {node.own for node in nodes}
        nodes[4].table.put(str(APP), "latest", resolved, "import")
        for node in nodes[:4]:
            with pytest.raises(UnavailableError):
                await node.version()
        nodes[3].table.put(str(APP), "latest", resolved, "import")
        assert [await node.version() for node in nodes] == [1] * 5
        assert nodes[4].row("latest")[1] == "import"

    play(tmp_path, 5, scenario)


@pytest.mark.parametrize("pins", [1, 2])
def test_a_pinned_tag_is_told_to_others_however_old_it_is(tmp_path: Path, pins: int) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        for node in nodes[1 : 1 + pins]:
            node.pinned.add("latest")
            await node.version()
        await trio.sleep(2 * MAX_AGE_S)
        registry.cut = {node.own for node in nodes}
        assert await nodes[1].version() == 1
        if pins == 2:
            assert await nodes[0].version() == 1
        else:
            with pytest.raises(UnavailableError):
                await nodes[0].version()

    play(tmp_path, 4, scenario)


def test_a_tag_that_the_registry_lacks_is_an_error_on_every_node(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        for node in nodes:
            with pytest.raises(NotFoundError):
                await node.names.resolve(APP, "none")

    play(tmp_path, 3, scenario)


def test_a_member_that_never_answers_delays_an_answer_little(tmp_path: Path) -> None:
    """S-47"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        async def never(peer: PeerId, request: Request) -> Answer:
            await trio.sleep_forever()
            raise AssertionError

        for node in nodes[2:]:
            await node.version()
        nodes[1].handler = never
        registry.cut = {nodes[0].own}
        with trio.fail_after(ASK_S + 1):
            assert await nodes[0].version() == 1

    play(tmp_path, 5, scenario)


def test_members_that_die_delay_an_answer_little(tmp_path: Path) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        for node in nodes[1:]:
            await node.version()
        registry.cut = {nodes[0].own}
        for node in nodes[1:3]:
            network.kill(node.own)
        with trio.fail_after(10):
            assert await nodes[0].version() == 1

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
        for node in nodes[:3]:
            assert await node.version() == 1
        other = nodes[3]
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
