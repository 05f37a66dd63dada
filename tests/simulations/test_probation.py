"""A member has others keep more than they have room for. What their clients read stays, and most of what they keep."""

from __future__ import annotations

from hashlib import sha256
from itertools import count, islice

import pytest

from cache.store import READ_HERE
from node.blocks.values import Stretch
from node.exchange.contract import Lane
from node.exchange.memory import MemoryNetwork
from protocol.ids import BLOCK_SIZE, Digest, ObjectRef, Piece, Shard
from protocol.messages import Announce
from protocol.records import make_record
from tests.support.site_in_memory import BODY, LOCATOR, REF, Node, Registry, all_read, play, read_whole

DISK, MEMORY = 12 << 20, 4 << 20
OBJECTS = 200
"""Each is one block: their shards take twice the disk of a node, whole blocks eight times."""
JUNK = bytes(BLOCK_SIZE)


def only(ref: ObjectRef) -> Stretch:
    """The block of an invented object."""
    return Stretch(LOCATOR, ref, (0,))


def invented(liar: Node, home: Node) -> list[ObjectRef]:
    """Objects that do not exist, with the home."""
    refs = (ObjectRef(Digest("sha256", sha256(b"%d" % number).hexdigest()), BLOCK_SIZE) for number in count())
    place = liar.site.placement()
    return list(
        islice((ref for ref in refs if place.route(liar.own, only(ref).stripe, ref.size).home == home.own), OBJECTS)
    )


async def have_kept(liar: Node, ref: ObjectRef) -> None:
    """Have each keeper of the object keep its shard. The liar holds the block and announces it."""
    record = make_record(ref, 0, sha256(JUNK).digest(), signer=liar.own, sign=liar.identity.sign)
    piece = Piece(ref.block(0))
    await liar.tiers.put(piece, JUNK, record, kept_for=READ_HERE)
    place = liar.site.placement()
    for peer in place.directory(ref.digest):
        if peer != liar.own:
            await liar.exchange.request(peer, Announce((str(ref.digest),)), lane=Lane.CONTROL, silence_s=1.0)
    route = place.route(liar.own, only(ref).stripe, ref.size)
    for index, peer in enumerate(route.keepers):
        if peer in (liar.own, route.home):
            continue
        shard = Shard(route.shape.k, route.shape.m, index)
        await liar.ask_shard(peer, only(ref), shard, hops=route.hops)
    await liar.tiers.discard(piece)


@pytest.mark.parametrize("home_is", ["the liar", "an honest member"])
def test_a_cut_off_site_keeps_its_image_whatever_a_member_has_it_keep(home_is: str) -> None:
    """S-59"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        *honest, liar = nodes
        for node in honest:
            node.disk.resize(DISK)
            node.tiers.stores["memory"].resize(MEMORY)  # type: ignore[attr-defined]
        await all_read(honest[:2])
        registry.down = True
        pieces = [Piece(REF.block(index)) for index in range(REF.block_count)]
        before = [node.disk.holdings(REF.digest) for node in honest]
        homes = [liar] if home_is == "the liar" else honest[2:]
        for home in homes:
            for ref in invented(liar, home):
                await have_kept(liar, ref)
        for node in honest[:2]:
            assert all(node.disk.is_used_here(piece) for piece in pieces)
        assert [node.disk.holdings(REF.digest) for node in honest] == before
        kept = [node.disk.statistics() for node in honest]
        assert all(figures.bytes > DISK * 3 // 4 for figures in kept), "the liar had as much kept as there was room for"
        for node in honest:
            assert await read_whole(node.library) == BODY
        assert not honest[0].view.quarantined

    play(5, scenario, limit_s=600.0)
