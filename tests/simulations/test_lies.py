"""Members that lie about shards, blocks, holdings, members and names: every read ends, with the right bytes.

Virtual time. The names S-nn are lines of docs/SECURITY.md.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from node.blocks.coded_read import Faults
from node.exchange.contract import Answer
from node.exchange.memory import MemoryNetwork
from node.identity.identity import Identity
from protocol.errors import UnavailableError
from protocol.ids import BLOCK_SIZE, PeerId
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
from tests.support import names_in_memory as tags
from tests.support.site_in_memory import REF, Node, Registry, all_read, flipped, home_of, not_keeping, play


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


@pytest.mark.parametrize("count", [5, 7])
def test_a_home_that_sends_keepers_wrong_shards_gets_no_keeper_quarantined(count: int) -> None:
    """S-04"""

    async def scenario(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        liar = home_of(nodes, 0)
        liar.spoil = flipped
        for node in nodes:
            if node is not liar:
                await node.read_all()
        assert any(node.view.quarantined for node in nodes)
        assert all(set(node.view.quarantined) <= {liar.own} for node in nodes)

    play(count, scenario)


@given(
    st.sampled_from("abcdef").flatmap(
        lambda liar: st.lists(
            st.frozensets(st.sampled_from("abcdef"), max_size=3).map(lambda others: others | {liar})
        ).map(lambda events: (liar, events))
    )
)
def test_no_single_liar_gets_an_honest_member_quarantined(attack: tuple[str, list[frozenset[str]]]) -> None:
    """S-04: in every event the liar is one of the members that may have made the wrong shard."""
    liar, events = attack

    async def main() -> None:
        faults = Faults()
        for number, makers in enumerate(events):
            alone = any(makers & others == {liar} for others in events[: number + 1])
            assert faults.wrong(frozenset(map(PeerId, makers))) == (liar if alone else None)

    trio.run(main)


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
    """S-24"""

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
