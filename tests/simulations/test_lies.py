"""Members that lie about shards, blocks, holdings, members and names: every read ends, with the right bytes.

Virtual time. The names S-nn are lines of docs/SECURITY.md.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cache.store import READ_HERE
from node.blocks.values import BlockAddress
from node.exchange.contract import Answer
from node.exchange.memory import MemoryNetwork
from node.identity.identity import Identity
from protocol.erasure import encode_shard
from protocol.errors import UnavailableError
from protocol.ids import BLOCK_SIZE, PeerId, Piece, Shard
from protocol.members import Member
from protocol.messages import (
    BlockFound,
    Failed,
    GetBlock,
    Holders,
    HoldingsFound,
    Request,
    Resolved,
)
from protocol.placement import HOME_HOPS
from protocol.records import make_record
from protocol.shard_proofs import make_proof
from tests.support import names_in_memory as tags
from tests.support.site_in_memory import (
    LOCATOR,
    REF,
    Node,
    Registry,
    all_read,
    flipped,
    home_of,
    not_keeping,
    play,
    signing,
    unsigned,
)


def test_a_wrong_parity_shard_makes_no_wrong_block() -> None:
    """S-02"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await all_read(nodes)
        reader = not_keeping(nodes, 0)
        _, keepers = reader.site.placement().keepers(REF.block(0), BLOCK_SIZE)
        by_id = {node.own: node for node in nodes}
        liar = by_id[keepers[4]]
        liar.spoil = flipped
        network.kill(keepers[1])  # so that the parity is needed
        await reader.forget(0)
        registry.asked.clear()
        assert (await reader.read(0)).held.data == (await nodes[0].read(0)).held.data
        assert set(reader.view.quarantined) <= {liar.own}

    play(7, scenario)


def test_wrong_bytes_of_a_whole_block_are_refused_on_arrival() -> None:
    """S-03"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        liar, reader = nodes
        await liar.read_all()
        liar.spoil = flipped
        await reader.read_all()
        assert set(reader.view.quarantined) == {liar.own}

    play(2, scenario)


STRANGER = Identity.of(Ed25519PrivateKey.from_private_bytes(bytes(31) + b"s"))
"""A key without a certificate: no node accepts it as a member."""


def lie_of(node: Node, kind: str) -> Callable[[Answer], Answer]:
    """Wrong shards, with the proof of the right one, without a proof, or with one over the wrong bytes."""
    lies = {"altered": flipped, "unsigned": unsigned, "signed": signing(node.identity), "stranger": signing(STRANGER)}
    return lies[kind]


@pytest.mark.parametrize("count", [5, 7])
@pytest.mark.parametrize("kind", ["altered", "unsigned", "signed"])
def test_a_home_that_sends_keepers_wrong_shards_gets_no_keeper_quarantined(count: int, kind: str) -> None:
    """S-04"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        liar = home_of(nodes, 0)
        liar.spoil = lie_of(liar, kind)
        reader = next(node for node in nodes if node is not liar)
        await reader.read(0)
        assert any(node.view.is_quarantined(liar.own) for node in nodes), "after the first block"
        for node in nodes:
            if node is not liar:
                await node.read_all()
        assert all(set(node.view.quarantined) <= {liar.own} for node in nodes)

    play(count, scenario)


def test_a_maker_that_is_no_member_convicts_nobody_and_its_shards_are_not_kept() -> None:
    """S-04: the liar signs wrong shards with keys that it invented."""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        liar = home_of(nodes, 0)
        liar.spoil = lie_of(liar, "stranger")
        for node in nodes:
            if node is not liar:
                await node.read_all()
        assert not any(node.view.quarantined for node in nodes)
        for node in nodes:
            held = [await node.tiers.get(Piece(REF.block(0), Shard(4, 1, index))) for index in range(5)]
            assert all(kept[0].proof and kept[0].proof.maker != STRANGER.peer_id for kept in held if kept)

    play(7, scenario)


def keepers_of(nodes: list[Node], index: int) -> tuple[PeerId, ...]:
    return nodes[0].site.placement().keepers(REF.block(index), BLOCK_SIZE)[1]


async def keep_shards(nodes: list[Node], index: int) -> list[Node]:
    """Have the other keepers of a block obtain their shards from its home, as if others had asked for it."""
    keepers = keepers_of(nodes, index)
    kept = [node for node in nodes if node.own in keepers[1:]]
    for node in kept:
        shard = Shard(4, 1, keepers.index(node.own))
        await node.blocks.keeper.keep(BlockAddress(LOCATOR, REF, index), shard, HOME_HOPS, exact=True)
    return kept


@pytest.mark.parametrize("then", ["keeps nothing", "leaves"])
@pytest.mark.parametrize("forgotten", [False, True])
def test_a_home_that_lied_and_keeps_nothing_any_more_is_blamed_and_no_keeper(then: str, forgotten: bool) -> None:
    """S-04: the liar claims a weight, becomes home, gives keepers wrong shards, and withdraws the weight."""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        liar = home_of(nodes, 0)
        liar.spoil = lie_of(liar, "signed")
        await keep_shards(nodes, 0)
        members = nodes[0].view.site
        left = [
            msgspec.structs.replace(member, weight=0.0) if member.peer_id == liar.own else member for member in members
        ]
        if then == "leaves":
            left = [member for member in members if member.peer_id != liar.own]
            network.kill(liar.own)
        honest = [node for node in nodes if node is not liar]
        for node in honest:
            node.view.see(left)
            if forgotten:
                node.view.forget(liar.own)
        for reader in honest:
            await reader.read_all()
        accused = {peer for node in honest for peer in node.view.quarantined}
        assert accused == (set() if forgotten else {liar.own})

    play(8, scenario)


def test_an_honest_shard_of_a_false_record_is_not_compared_with_the_true_block() -> None:
    """S-04: one liar signs a false record, of whose block an honest member makes a shard, and sends a wrong shard."""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        home, (liar, *_) = home_of(nodes, 0), await keep_shards(nodes, 0)
        liar.spoil = lie_of(liar, "signed")
        reader, maker = (node for node in nodes if node.own not in keepers_of(nodes, 0))
        false, shard = bytes(BLOCK_SIZE), Shard(4, 1, 0)
        record = make_record(REF, 0, sha256(false).digest(), signer=liar.own, sign=liar.identity.sign)
        data = encode_shard(false, 4, 1, 0)
        proof = make_proof(record, shard, data, maker=maker.own, sign=maker.identity.sign)
        await home.forget(0)
        await home.tiers.put(Piece(REF.block(0), shard), data, record, proof, kept_for=READ_HERE)
        await reader.read(0)
        assert set(reader.view.quarantined) == {liar.own}

    play(7, scenario)


@pytest.mark.parametrize("answers", ["not held", "wrong bytes"])
def test_a_false_claim_to_hold_a_block_costs_a_question_and_no_copy(answers: str) -> None:
    """S-18"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        liar = nodes[0]

        def lie(answer: Answer) -> Answer:
            message = answer.message
            if isinstance(message, HoldingsFound):
                return Answer(HoldingsFound(b"\xff", ()))
            if isinstance(message, Holders):
                return Answer(Holders((liar.own,)))
            return flipped(answer) if answers == "wrong bytes" and not isinstance(message, Failed) else answer

        for node in nodes:
            for digest in (REF.digest,):
                node.blocks.directory.announce(digest, liar.own, trio.current_time())
        liar.spoil = lie
        await all_read(nodes[1:])
        assert all(count <= 2 for count in registry.asked.values())
        assert all(set(node.view.quarantined) <= {liar.own} for node in nodes)

    play(6, scenario)


@pytest.mark.parametrize("urgent", [False, True])
def test_an_answer_that_never_ends_is_given_up(urgent: bool) -> None:
    """S-19: the member sends `Waiting` without end."""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        liar = nodes[0]

        async def never(peer: PeerId, request: Request) -> Answer:
            await trio.sleep_forever()
            raise AssertionError

        liar.handler = never
        for node in nodes[1:]:
            for index in range(REF.block_count):
                with trio.fail_after(20):
                    await node.read(index, urgent=urgent)
        assert not any(node.view.quarantined for node in nodes), "slowness does not count as a lie"

    play(6, scenario)


def test_invented_members_cost_time_and_fail_no_pull() -> None:
    """S-55"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        keys = [Ed25519PrivateKey.from_private_bytes(sha256(bytes([9, n])).digest()) for n in range(40)]
        ghosts = [Member(Identity.of(key).peer_id, "ghost", "site", ("192.0.2.9:1",)) for key in keys]
        for node in nodes:
            node.view.see((*node.view.site, *ghosts))
        for node in nodes:
            await node.read_all()

    play(5, scenario)


@pytest.mark.parametrize("asked", ["latest", str(REF.digest)])
def test_members_have_no_say_about_a_name_while_the_registry_answers(tmp_path: Path, asked: str) -> None:
    """S-25: whatever all other members say, a client gets what the registry said to its node."""
    wrong = "sha256:" + "66" * 32

    async def scenario(nodes: list[tags.Node], registry: tags.Registry, network: MemoryNetwork) -> None:
        questions = 0

        async def lie(peer: PeerId, request: Request) -> Answer:
            nonlocal questions
            questions += 1
            return Answer(Resolved(wrong, 1, "a/b", 0.0))

        for node in nodes[1:]:
            node.handler = lie
        resolved = await nodes[0].names.resolve(tags.APP, asked)
        assert resolved.ref == (await nodes[0].reached.resolve(tags.APP, asked))[0].ref
        assert not questions
        await trio.sleep(2 * tags.TTL_S)
        registry.cut = {nodes[0].own}
        assert (await nodes[0].names.resolve(tags.APP, asked)).ref == resolved.ref, "its own answer goes first"

    tags.play(tmp_path, 4, scenario)


def test_an_answer_with_another_digest_than_the_requested_is_refused(tmp_path: Path) -> None:
    """S-25"""
    wrong = "sha256:" + "66" * 32

    async def scenario(nodes: list[tags.Node], registry: tags.Registry, network: MemoryNetwork) -> None:
        async def lie(peer: PeerId, request: Request) -> Answer:
            return Answer(Resolved(wrong, 1, "a/b", 0.0))

        for node in nodes[1:]:
            node.handler = lie
        registry.cut = {nodes[0].own}
        with pytest.raises(UnavailableError):
            await nodes[0].names.resolve(tags.APP, str(REF.digest))

    tags.play(tmp_path, 4, scenario)


@pytest.mark.parametrize("code", ["not-found", "denied"])
def test_a_member_that_says_that_an_object_is_missing_is_not_believed(code: str) -> None:
    """S-47"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        async def lie(peer: PeerId, request: Request) -> Answer:
            return Answer(Failed(code, "it does not exist"))

        reader, liars = nodes[0], nodes[1:]
        for liar in liars:
            liar.handler = lie
        await reader.read_all()
        registry.down = True
        await reader.forget(0)
        for index in range(1, REF.block_count):
            await reader.read(index)
        with pytest.raises(UnavailableError):
            await reader.read(0)

    play(6, scenario)


def test_an_answer_with_another_block_is_refused() -> None:
    """S-03: a record of another block than the requested one is refused."""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        await nodes[0].read_all()
        answer = await nodes[0].handle(nodes[1].own, GetBlock(str(REF.digest), 1, REF.size))
        assert isinstance(answer.message, BlockFound)

        async def replay(peer: PeerId, request: Request) -> Answer:
            return answer  # block 1 for any request

        nodes[0].handler = replay
        assert await nodes[1].read_all()
        assert all(set(node.view.quarantined) <= {nodes[0].own} for node in nodes)

    play(3, scenario)
