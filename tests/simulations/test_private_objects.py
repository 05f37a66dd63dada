"""Origins of private objects, and false sizes, between the nodes of a site in virtual time."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import msgspec
import pytest

from cache.store import READ_HERE
from node.blocks.object_facts import OPEN, UNKNOWN, origin_of
from node.blocks.values import Stretch
from node.exchange.memory import MemoryNetwork
from node.oci.references import Grant, Locator
from protocol.errors import UnavailableError
from protocol.ids import Buffer, Digest, ObjectRef, Piece, Shard
from protocol.messages import ShardFound
from protocol.records import make_record
from tests.support.site_in_memory import (
    LOCATOR,
    REF,
    Node,
    Registry,
    all_read,
    keepers_of,
    not_keeping,
    play,
    read_whole,
)

OTHER = Locator("origin.test", "public", "blobs")


@pytest.mark.parametrize("count", [1, 2, 5, 12, 25])
def test_the_origin_of_a_private_object_reaches_each_node_that_holds_a_part(count: int) -> None:
    """S-61"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        registry.private = True
        await nodes[0].read_granted()
        for node in nodes:
            if node.tiers.holds_part(REF.digest):
                assert node.site.facts.origin(REF.digest) == origin_of(LOCATOR)
        reader = nodes[-1]
        await reader.read_all(OTHER)  # the parts of node/blocks check no rights: the mirror does, by the mark
        assert reader.site.facts.origin(REF.digest) == origin_of(LOCATOR)

    play(count, scenario)


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_an_object_that_everybody_may_read_is_open_on_each_node(count: int) -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await all_read(nodes)
        assert {node.site.facts.origin(REF.digest) for node in nodes} == {OPEN}

    play(count, scenario)


def test_a_member_that_hides_the_origin_hides_it_only_of_what_passes_through_it() -> None:
    """S-61"""

    def openly(message: ShardFound, body: Buffer) -> tuple[ShardFound, Buffer]:
        return msgspec.structs.replace(message, origin=OPEN), body

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        registry.private = True
        await nodes[0].read_granted()
        reader = not_keeping(nodes, 0)
        keepers_of(nodes, 0)[1].spoil = openly
        await reader.read_all(OTHER)
        assert reader.site.facts.origin(REF.digest) == origin_of(LOCATOR)

    play(8, scenario)


def test_a_node_that_does_not_know_the_origin_says_so() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await nodes[0].read_all()
        stranger = Digest("sha256", "ab" * 32)
        ref = ObjectRef(stranger, 5)
        own = nodes[0].identity
        record = make_record(ref, 0, sha256(b"hello").digest(), signer=own.peer_id, sign=own.sign)
        await nodes[0].tiers.put(
            Piece(ref.block(0)), b"hello", record, kept_for=READ_HERE
        )  # as from a cache of an earlier version
        found = await nodes[1].ask_shard(nodes[0].own, Stretch(LOCATOR, ref, (0,)), Shard(1, 0, 0), hops=0)
        assert found.origin == UNKNOWN

    play(2, scenario)


@pytest.mark.parametrize("size", [1, REF.size - 1, REF.size + 1, 1 << 40])
def test_no_member_reads_or_signs_for_a_size_that_it_knows_to_be_false(size: int) -> None:
    """S-37"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        for node in nodes:
            assert len(await read_whole(node.library)) == REF.size
            assert node.site.facts.size(REF.digest) == REF.size
        asked = registry.asked.total()
        false = ObjectRef(REF.digest, size)
        for asker, node in zip(nodes, nodes[1:] + nodes[:1], strict=True):
            with pytest.raises(UnavailableError, match="unavailable: "):
                await asker.ask_shard(node.own, Stretch(LOCATOR, false, (0,)), Shard(1, 0, 0), hops=1)
            with pytest.raises(UnavailableError):
                node.site.check_size(false)
        assert registry.asked.total() == asked
        assert all(node.tiers.holds(Piece(REF.block(0))) for node in nodes)

    play(3, scenario)


def test_an_object_beyond_the_bound_is_refused_to_members() -> None:
    """S-37"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        most = nodes[0].site.max_object
        assert most == 64 << 30
        wrong = Stretch(LOCATOR, ObjectRef(REF.digest, most + 1), (0,))
        with pytest.raises(UnavailableError, match=r"unavailable: .* more than max_object"):
            await nodes[0].ask_shard(nodes[1].own, wrong, Shard(1, 0, 0), hops=1)
        assert registry.asked.total() == 0

    play(2, scenario)


def test_a_grant_makes_no_open_object_private() -> None:
    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await nodes[0].read_all()
        await nodes[0].forget(0)
        locator = replace(LOCATOR, grant=Grant("Bearer x"))
        with nodes[0].blocks.grants.granted(locator, REF.digest):
            await nodes[0].read_all(locator)
        assert nodes[0].site.facts.origin(REF.digest) == OPEN

    play(1, scenario)
