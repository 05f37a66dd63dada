"""Members that lie about shards, blocks, holdings, members and names: every read ends, with the right bytes.

Virtual time. The names S-nn are lines of docs/SECURITY.md.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cache.store import READ_HERE
from node.blocks.values import Stretch
from node.exchange.contract import Answer, Sender
from node.exchange.memory import MemoryNetwork
from node.identity.identity import Identity
from protocol.erasure import encode_shard
from protocol.errors import DeniedError, NotFoundError, PeerMisbehavedError, ShoalError, UnavailableError
from protocol.ids import BLOCK_SIZE, PeerId, Piece, Shard
from protocol.members import Member
from protocol.messages import (
    FindHolders,
    GetHoldings,
    GetShards,
    Holders,
    HoldingsFound,
    Request,
    Resolved,
    ShardFound,
)
from protocol.records import make_record
from protocol.shard_proofs import make_proof
from tests.support import names_in_memory as tags
from tests.support.site_in_memory import (
    LOCATOR,
    REF,
    Node,
    Registry,
    Spoil,
    all_read,
    flipped,
    home_of,
    keepers_of,
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
        _, other, *_, liar = keepers_of(nodes, 0)
        liar.spoil = flipped
        network.kill(other.own)  # so that the parity is needed
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


def lie_of(node: Node, kind: str) -> Spoil:
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
        await trio.testing.wait_all_tasks_blocked()
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


async def keep_shards(nodes: list[Node], index: int) -> list[Node]:
    """Have the other keepers of a block obtain their shards from its home, as if others had asked for it."""
    _, *kept = keepers_of(nodes, index)
    for rank, node in enumerate(kept, 1):
        await node.own_shard(index, Shard(4, 1, rank))
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
        reader, maker = (node for node in nodes if node not in keepers_of(nodes, 0))
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

        async def lie(peer: PeerId, request: Request) -> Answer:
            match request:
                case GetHoldings():
                    return Answer(HoldingsFound(b"\xff", ()))
                case FindHolders():
                    return Answer(Holders((liar.own,)))
            return await liar.handle(peer, request)

        for node in nodes:
            node.blocks.directory.announce(REF.digest, liar.own, trio.current_time())
        liar.handler = lie
        if answers == "wrong bytes":
            liar.spoil = flipped
        await all_read(nodes[1:])
        assert all(count <= 2 for count in registry.asked.values())
        assert all(set(node.view.quarantined) <= {liar.own} for node in nodes)

    play(6, scenario)


@pytest.mark.parametrize("urgent", [False, True])
def test_an_answer_that_never_ends_is_given_up(urgent: bool) -> None:
    """S-19: the member sends `Waiting` without end."""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        liar = nodes[0]

        async def never(peer: PeerId, request: GetShards, sender: Sender) -> None:
            await trio.sleep_forever()

        liar.server = never
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


@pytest.mark.parametrize("failure", [NotFoundError, DeniedError])
def test_a_member_that_says_that_an_object_is_missing_is_not_believed(failure: type[ShoalError]) -> None:
    """S-47"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        async def lie(peer: PeerId, request: GetShards, sender: Sender) -> None:
            raise failure("it does not exist")

        reader, liars = nodes[0], nodes[1:]
        for liar in liars:
            liar.server = lie
        await reader.read_all()
        registry.down = True
        await reader.forget(0)
        for index in range(1, REF.block_count):
            await reader.read(index)
        with pytest.raises(UnavailableError):
            await reader.read(0)

    play(6, scenario)


@pytest.mark.parametrize("lie", ["another block", "a block twice", "another object"])
def test_an_answer_with_another_block_is_refused(lie: str) -> None:
    """S-03: a record of another block than the requested ones, or of one that came already, is refused."""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        liar, reader = nodes[:2]
        await liar.read_all()
        held = await liar.tiers.get(Piece(REF.block(1)))
        assert held is not None
        record, body = held[0].record, held[0].data
        if lie == "another object":
            record = msgspec.structs.replace(record, digest="sha256:" + "66" * 32)

        async def replay(peer: PeerId, request: GetShards, sender: Sender) -> None:
            for _ in range(1 + (lie == "a block twice")):
                sender.send(ShardFound(1, 0, 0, record), body)  # for any request

        liar.server = replay
        assert await reader.read_all()
        assert all(set(node.view.quarantined) <= {liar.own} for node in nodes)
        wanted = {"another block": (2,), "a block twice": (1, 2), "another object": (1,)}[lie]
        asked = Stretch(LOCATOR, REF, wanted)
        with pytest.raises(PeerMisbehavedError):
            await nodes[2].ask_shard(liar.own, asked, Shard(1, 0, 0), hops=0)

    play(3, scenario)
