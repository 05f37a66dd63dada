"""False records and accusations: which members are quarantined, by which others, and at what cost. Virtual time.

The names S-nn are lines of docs/SECURITY.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from hashlib import sha256
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cache.store import READ_HERE
from node.blocks.trust import Suspicion
from node.content import library
from node.content.library import SiteLibrary
from node.evidence.cases import MAX_KEPT, MAX_UNDECIDED, Case, Verdict
from node.evidence.findings import READING_S, SHOWING_S, Findings
from node.evidence.judge import EXCHANGE_S, PAUSE_S, RETRY_S, SPREAD_S, Judge
from node.evidence.judge_file import EvidenceFile
from node.exchange.contract import Answer, Lane, Sender
from node.exchange.memory import MemoryNetwork
from node.identity.identity import Identity
from node.membership.membership import QUARANTINE_S, Membership
from protocol.errors import CorruptObjectError, PeerMisbehavedError, PeerUnavailableError, UnavailableError
from protocol.evidence import Evidence, check_evidence, make_evidence
from protocol.ids import BLOCK_SIZE, Buffer, Digest, ObjectRef, PeerId, Piece, Shard
from protocol.messages import Accuse, GetShards, Request, ShardFound
from protocol.records import Record, make_record
from tests.support import site_in_memory
from tests.support.passports import passports_of
from tests.support.site_in_memory import (
    BODY,
    LOCATOR,
    REF,
    Registry,
    WithMirror,
    home_of,
    not_keeping,
    read_whole,
    stretch,
    under,
)

SOURCE = str(LOCATOR)
SOON_S = 2 * EXCHANGE_S


class Node(site_in_memory.Node):
    def __init__(self, *site: Any, nursery: trio.Nursery) -> None:
        super().__init__(*site, nursery=nursery)
        self.mirrored = False
        self.judge = Judge(
            site=self.site,
            findings=Findings(
                self.site, self.blocks.home, self.blocks.questions, mirrored=lambda upstream: self.mirrored
            ),
            questions=self.blocks.questions,
            sign=self.identity.sign,
            nursery=nursery,
            rng=Random(self.own),
        )
        self.dispatcher.route(self.judge.handle, Accuse)

    async def read_as_home(self) -> None:
        """Read all blocks from the registry, so that their records are this node's."""
        for index in range(REF.block_count):
            await self.blocks.home.blocks(stretch(index), lambda index, obtained: None)

    def signs(self, index: int, data: bytes) -> Record:
        return make_record(REF, index, sha256(data).digest(), self.own, sign=self.identity.sign)

    def accuses(self, record: Record, other: Record | None = None) -> Evidence:
        return make_evidence(record, SOURCE, self.own, self.identity.sign, other=other)

    async def tells(self, target: Node, *evidence: Evidence) -> None:
        await self.blocks.questions.ask(
            target.own, Accuse(tuple((piece, 0.0) for piece in evidence)), Lane.CONTROL, 1.0
        )


def suspicion(record: Record, *, proven: bool) -> Suspicion:
    return Suspicion(record, SOURCE, proven)


Scenario = Callable[[list[Node], Registry], Awaitable[None]]


def play(count: int, scenario: Scenario, judging: int | None = None, registry: Registry | None = None) -> None:
    """Run a scenario with `count` nodes. Only the judges of the first `judging` nodes run, if it is given."""

    async def judged(nodes: list[Node], registry: Registry, network: MemoryNetwork) -> None:
        async with trio.open_nursery() as nursery:
            for node in nodes[:judging]:
                await nursery.start(node.judge.run)
            await scenario(nodes, registry)
            nursery.cancel_scope.cancel()

    site_in_memory.play(count, judged, make=Node, registry=registry, limit_s=3 * QUARANTINE_S)


async def until(holds: Callable[[], bool], within_s: float = SOON_S) -> None:
    ends = trio.current_time() + within_s
    while not holds():
        assert trio.current_time() < ends, f"not within {within_s} s"
        await trio.sleep(0.1)


async def poison(liar: Node, index: int) -> Record:
    """Have the liar keep a false block with a matching record, so that it answers with them."""
    false = bytes(REF.block_length(index))
    record = liar.signs(index, false)
    await liar.tiers.put(Piece(REF.block(index)), false, record, kept_for=READ_HERE)
    return record


def verdicts(nodes: list[Node], liar: Node) -> list[Verdict]:
    return [case.verdict for node in nodes for case in node.judge.cases.about(liar.own)]


@pytest.mark.parametrize("index", range(REF.block_count))
@pytest.mark.parametrize("checked_first", [True, False])
def test_the_whole_site_quarantines_the_signer_of_a_false_record(
    index: int, checked_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S-05"""
    if not checked_first:
        monkeypatch.setattr(library, "CHECKED_FIRST", REF.size - 1)

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar = home_of(nodes, index)  # type: ignore[arg-type] # a list of a subclass
        assert isinstance(liar, Node)
        await poison(liar, index)
        others = [node for node in nodes if node is not liar]
        # False blocks that no client has received yet are replaced at once.
        if checked_first or index == REF.block_count - 1:
            assert await read_whole(others[0].library) == BODY
        else:
            with pytest.raises(CorruptObjectError):
                await read_whole(others[0].library)
            assert await read_whole(others[0].library) == BODY
        await until(lambda: all(node.view.is_quarantined(liar.own) for node in others))
        assert verdicts(others, liar) == [Verdict.PROVEN] * len(others)
        for node in others[1:]:
            assert set(node.view.quarantined) == {liar.own}
            (case,) = node.judge.cases.about(liar.own)
            assert case.evidence.finder == others[0].own
            assert case.evidence.record.index == index
            assert await read_whole(node.library) == BODY

    play(7, scenario)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (BLOCK_SIZE - 10, BLOCK_SIZE + 10), (REF.size - 5, REF.size)])
def test_a_part_of_a_small_object_is_sent_only_if_all_of_it_is_right(start: int, stop: int) -> None:
    """S-05"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar = nodes[0]
        for index in range(REF.block_count):
            await poison(liar, index)
        async with aclosing(nodes[1].library.read(LOCATOR, REF, start, stop)) as chunks:
            assert b"".join([bytes(chunk) async for chunk in chunks]) == BODY[start:stop]
        await until(lambda: nodes[2].view.is_quarantined(liar.own))

    play(3, scenario)


@pytest.mark.parametrize("dropped", [[0], [REF.block_count - 1], list(range(REF.block_count))], ids=str)
def test_a_read_whose_false_blocks_are_dropped_before_it_ends_succeeds(dropped: list[int]) -> None:
    """S-06: other members' evidence convinces this node between the arrival of the blocks and the check of the
    object."""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        (node,) = nodes
        await read_whole(node.library)
        _, verifier = node.library_and_verifier()
        for index in dropped:
            await node.tiers.discard(Piece(REF.block(index)))
        last = await verifier.check(LOCATOR, REF, "00" * 32)
        assert last is not None
        assert bytes(last) == BODY[(REF.block_count - 1) * BLOCK_SIZE :]
        assert await read_whole(node.library) == BODY

    play(1, scenario)


def test_a_read_whose_blocks_are_dropped_while_it_repairs_them_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """S-06: the judge drops what its list of the liar's pieces names, also if it was replaced since."""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        (node,) = nodes
        await read_whole(node.library)
        _, verifier = node.library_and_verifier()
        piece, dropped = Piece(REF.block(0)), list[None]()
        await node.tiers.discard(piece)
        put = node.tiers.put

        async def put_and_drop(given: Piece, *arguments: Any, **named: Any) -> None:
            await put(given, *arguments, **named)
            if given == piece and len(dropped) < 2:
                dropped.append(None)
                await node.tiers.discard(piece)

        monkeypatch.setattr(node.tiers, "put", put_and_drop)
        assert await verifier.check(LOCATOR, REF, "00" * 32) is not None
        assert len(dropped) == 2
        assert await read_whole(node.library) == BODY

    play(1, scenario)


def test_a_dropped_block_that_a_client_has_received_fails_its_read() -> None:
    async def scenario(nodes: list[Node], registry: Registry) -> None:
        (node,) = nodes
        await read_whole(node.library)
        _, verifier = node.library_and_verifier()
        await node.tiers.discard(Piece(REF.block(0)))
        with pytest.raises(CorruptObjectError):
            await verifier.check(LOCATOR, REF, "00" * 32, given=1)

    play(1, scenario)


PARTS = [(0, 10), (BLOCK_SIZE, BLOCK_SIZE + 10), (2 * BLOCK_SIZE, REF.size)]


async def read_parts(reader: SiteLibrary, *parts: tuple[int, int]) -> bytes:
    read = b""
    for start, stop in parts:
        async with aclosing(reader.read(LOCATOR, REF, start, stop)) as chunks:
            read += b"".join([bytes(chunk) async for chunk in chunks])
    return read


@pytest.mark.parametrize("index", range(REF.block_count))
def test_a_large_object_sent_in_parts_is_verified_once_all_of_it_is_held(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S-05"""
    monkeypatch.setattr(library, "CHECKED_FIRST", REF.size - 1)

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar = home_of(nodes, index)  # type: ignore[arg-type]
        assert isinstance(liar, Node)
        await poison(liar, index)
        reader, *others = (node for node in nodes if node is not liar)
        given, verifier = reader.library_and_verifier()
        async with trio.open_nursery() as nursery:
            await nursery.start(verifier.run)
            await read_parts(given, *PARTS[:-1])
            await trio.sleep(60)
            assert not reader.view.is_quarantined(liar.own), "some blocks are missing"
            await read_parts(given, *PARTS[-1:])
            await until(lambda: all(node.view.is_quarantined(liar.own) for node in (reader, *others)))
            assert await read_parts(given, *PARTS) == b"".join(BODY[start:stop] for start, stop in PARTS)
            nursery.cancel_scope.cancel()
        assert verdicts(others, liar) == [Verdict.PROVEN] * len(others)

    play(7, scenario)


def test_a_right_object_is_checked_once_in_an_hour_and_never_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "CHECKED_FIRST", REF.size - 1)

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        (node,) = nodes
        given, verifier = node.library_and_verifier()
        sealed = list[ObjectRef]()
        monkeypatch.setattr(node.tiers, "seal", sealed.append)
        async with trio.open_nursery() as nursery:
            await nursery.start(verifier.run)
            for hour in (1, 2):
                for _ in range(10):
                    await read_parts(given, *PARTS)
                    await trio.sleep(1)
                assert sealed == [REF] * hour
                await trio.sleep(3600)
            nursery.cancel_scope.cancel()
        assert registry.asked.total() == REF.block_count

    play(1, scenario)


def test_a_part_is_sent_of_an_object_that_cannot_be_read_whole() -> None:
    async def scenario(nodes: list[Node], registry: Registry) -> None:
        (node,) = nodes
        await node.read(1)
        registry.down = True
        async with aclosing(node.library.read(LOCATOR, REF, BLOCK_SIZE, BLOCK_SIZE + 9)) as chunks:
            assert b"".join([bytes(chunk) async for chunk in chunks]) == BODY[BLOCK_SIZE : BLOCK_SIZE + 9]

    play(1, scenario)


def test_no_byte_is_sent_of_a_manifest_that_was_not_read_before_and_is_none() -> None:
    """S-36: its bytes could not be read when its name was resolved."""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        chunks, given = list[bytes](), nodes[0].library
        unread: Any = SimpleNamespace(known=SimpleNamespace(has_read=lambda ref: False))
        given.resolver = unread
        async with aclosing(given.read(LOCATOR.of_kind("manifests"), REF, 0, REF.size)) as read:
            with pytest.raises(UnavailableError, match="no manifest"):
                chunks.extend([bytes(chunk) async for chunk in read])
        assert not b"".join(chunks)

    play(1, scenario)


def test_convinced_members_drop_the_blocks_of_a_liar() -> None:
    """S-06"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, others = nodes[0], nodes[1:]
        record = await poison(liar, 1)
        false = bytes(BLOCK_SIZE)
        for node in others:
            await node.tiers.put(Piece(REF.block(1)), false, record, kept_for=READ_HERE)
        await others[0].tells(others[1], others[0].accuses(record))
        await until(lambda: all(node.view.is_quarantined(liar.own) for node in others[1:]))
        assert not any(node.tiers.holds(Piece(REF.block(1))) for node in others[1:])

    play(5, scenario)


def test_other_blocks_of_a_liar_are_dropped_except_those_of_verified_objects() -> None:
    """S-06"""
    whole = b"right" * 200_000
    right = ObjectRef(Digest("sha256", sha256(whole).hexdigest()), len(whole))
    other = ObjectRef(Digest("sha256", "ab" * 32), 2 * BLOCK_SIZE)

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, finder, holder = nodes
        shard = Piece(other.block(1), Shard(4, 1, 2))
        for index in range(right.block_count):
            data = whole[index * BLOCK_SIZE :][:BLOCK_SIZE]
            record = make_record(right, index, sha256(data).digest(), liar.own, sign=liar.identity.sign)
            await holder.tiers.put(Piece(right.block(index)), data, record, kept_for=READ_HERE)
        for index, piece in ((0, Piece(other.block(0))), (1, shard)):
            record = make_record(other, index, sha256(bytes(BLOCK_SIZE)).digest(), liar.own, sign=liar.identity.sign)
            await holder.tiers.put(
                piece, bytes(BLOCK_SIZE if index == 0 else BLOCK_SIZE // 4), record, kept_for=READ_HERE
            )
        await finder.tells(holder, finder.accuses(liar.signs(0, bytes(BLOCK_SIZE))))
        await until(lambda: holder.view.is_quarantined(liar.own))
        await trio.sleep(1)
        assert not holder.tiers.holdings(other.digest).blocks
        assert not holder.tiers.holds(shard)
        assert all(holder.tiers.holds(Piece(right.block(index))) for index in range(right.block_count))

    play(3, scenario)


def test_a_record_that_no_bytes_match_is_detected_by_readers_of_the_block() -> None:
    """S-07"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar = home_of(nodes, 0)  # type: ignore[arg-type]
        assert isinstance(liar, Node)
        false = liar.signs(0, b"of no bytes at all".ljust(BLOCK_SIZE))

        def lie(message: ShardFound, body: Buffer) -> tuple[ShardFound, Buffer]:
            return (message, body) if message.record.index else under(false, message, body, liar.identity)

        liar.spoil = lie
        reader = not_keeping(nodes, 0)  # type: ignore[arg-type]
        assert bytes((await reader.read(0)).held.data) == BODY[:BLOCK_SIZE]
        others = [node for node in nodes if node is not liar]
        await until(lambda: all(node.view.is_quarantined(liar.own) for node in others))
        assert all(set(node.view.quarantined) == {liar.own} for node in others)

    play(7, scenario)


@pytest.mark.parametrize("mirrored", [False, True])
def test_two_records_of_one_block_convict_their_signer_without_the_registry(mirrored: bool) -> None:
    """S-08: except if the signer may have read either version from a mirror."""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, finder, receiver = nodes[0], nodes[1], nodes[2]
        receiver.mirrored, registry.down = mirrored, True
        pair = liar.signs(0, BODY[:BLOCK_SIZE]), liar.signs(0, bytes(BLOCK_SIZE))
        await finder.tells(receiver, finder.accuses(*pair))
        await trio.sleep(SOON_S)
        assert receiver.view.is_quarantined(liar.own) is not mirrored
        registry.down = False
        await trio.sleep(RETRY_S)
        assert receiver.view.is_quarantined(liar.own)
        assert not receiver.view.is_quarantined(finder.own)

    play(3, scenario, judging=3)


def test_a_reader_of_two_records_of_one_signer_reports_both() -> None:
    """S-08"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar = home_of(nodes, 0)  # type: ignore[arg-type]
        assert isinstance(liar, Node)
        given: list[Record] = []

        def lie(message: ShardFound, body: Buffer) -> tuple[ShardFound, Buffer]:
            """Send different bytes to each member that asks."""
            if message.record.index:
                return message, body
            given.append(liar.signs(0, bytes([len(given)]) * BLOCK_SIZE))
            return under(given[-1], message, body, liar.identity)

        liar.spoil = lie
        reader = not_keeping(nodes, 0)  # type: ignore[arg-type]
        assert bytes((await reader.read(0)).held.data) == BODY[:BLOCK_SIZE]
        await until(lambda: reader.view.is_quarantined(liar.own))
        assert reader.judge.cases.about(liar.own)[0].evidence.other is not None

    play(7, scenario)


def truths_of(signer: Node) -> list[Record]:
    return [signer.signs(index, BODY[index * BLOCK_SIZE :][:BLOCK_SIZE]) for index in range(REF.block_count)]


def test_a_false_accuser_is_quarantined_by_those_that_hold_the_object_and_heard_by_no_other() -> None:
    """S-09"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, honest, holder, others = nodes[0], nodes[1], nodes[2], nodes[3:]
        await honest.read_all()
        await holder.read_all()
        registry.asked.clear()
        for node in nodes[2:]:
            await liar.tells(node, *(liar.accuses(record) for record in truths_of(honest)))
        await until(lambda: holder.view.is_quarantined(liar.own))
        await trio.sleep(SOON_S)
        assert not any(node.view.is_quarantined(honest.own) for node in nodes)
        assert not any(node.view.quarantined for node in others)
        assert registry.asked.total() == len(others), "each other receiver reads one block"
        for node in others:
            before = len(node.judge.cases)
            await liar.tells(node, liar.accuses(honest.signs(0, bytes(BLOCK_SIZE))))
            assert len(node.judge.cases) == before

    play(6, scenario)


class Untrue(Registry):
    """A registry that some liar controls: while `lies`, it sends zeros in place of all blocks."""

    lies = True

    async def blocks(self, *run: Any, **options: Any) -> AsyncGenerator[bytearray, None]:
        async with aclosing(super().blocks(*run, **options)) as blocks:
            async for block in blocks:
                yield bytearray(len(block)) if self.lies else block


def test_a_liar_that_controls_a_registry_gets_no_honest_signer_quarantined() -> None:
    """S-09: its evidence names a source where it lets other bytes be served than those of the digest."""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, honest, others = nodes[0], nodes[1], nodes[2:]
        for node in others:
            await liar.tells(node, *(liar.accuses(record) for record in truths_of(honest)))
        await trio.sleep(SOON_S)
        assert not any(node.view.quarantined for node in nodes)
        assert {case.verdict for node in others for case in node.judge.cases.values()} == {Verdict.UNPROVABLE}

    play(5, scenario, registry=Untrue())


def test_a_liar_that_controls_a_registry_gets_no_honest_accuser_quarantined() -> None:
    """S-09: the registry sends the bytes of the liar's false record to all but the accuser."""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, finder, others = nodes[0], nodes[1], nodes[2:]
        record = liar.signs(0, bytes(BLOCK_SIZE))
        for node in others:
            await finder.tells(node, finder.accuses(record))
        await trio.sleep(SOON_S)
        assert not any(node.view.quarantined for node in nodes)

    play(5, scenario, registry=Untrue())


def test_the_finder_shows_the_object_and_no_registry_is_asked() -> None:
    """S-14"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, finder, others = nodes[0], nodes[1], nodes[2:]
        await finder.read_as_home()
        registry.down = True
        registry.asked.clear()
        finder.site.trust.suspect(suspicion(liar.signs(2, bytes(BLOCK_SIZE)), proven=True))
        await until(lambda: all(node.view.is_quarantined(liar.own) for node in others))
        assert all(set(node.view.quarantined) == {liar.own} for node in others)
        assert not registry.asked

    play(5, scenario)


def test_a_reader_accuses_nobody_before_the_objects_digest_is_right() -> None:
    """S-09: a registry that sends a wrong block once must not make an honest reader accuse an honest signer."""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        assert isinstance(registry, Untrue)
        liar, honest, reader = nodes
        registry.lies = False
        for index, record in enumerate(truths_of(honest)):
            block = BODY[index * BLOCK_SIZE :][:BLOCK_SIZE]
            await reader.tiers.put(Piece(REF.block(index)), block, record, kept_for=READ_HERE)
        await reader.forget(3)
        zeros = bytes(REF.block_length(3))
        await reader.tiers.put(Piece(REF.block(3)), zeros, liar.signs(3, zeros), kept_for=READ_HERE)
        registry.lies = True
        with pytest.raises(CorruptObjectError):
            await read_whole(reader.library)
        await trio.sleep(SOON_S)
        assert not reader.judge.cases
        assert not liar.view.quarantined

    play(3, scenario, registry=Untrue())


def test_accusations_are_bounded_per_accuser_and_examined_one_by_one() -> None:
    """S-10"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, honest, receiver = nodes[0], nodes[1], nodes[2]
        registry.down = True
        records = [honest.signs(0, bytes([number]) * BLOCK_SIZE) for number in range(60)]
        await liar.tells(receiver, *(liar.accuses(record) for record in records))
        assert len(receiver.judge.cases) == MAX_UNDECIDED
        registry.down, registry.block_s = False, 1.0
        await trio.sleep(RETRY_S + SPREAD_S * 3 + 1)
        assert registry.asked.total() <= MAX_UNDECIDED * (1 + REF.block_count)

    play(3, scenario)


def test_the_table_of_evidence_is_bounded_and_proven_cases_stay_longest() -> None:
    """S-10"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        finder, signer, receiver = nodes
        proven = finder.accuses(signer.signs(0, b"false"))
        receiver.judge.cases.add(Case(proven, -10.0, Verdict.PROVEN))
        for number in range(2 * MAX_KEPT):
            evidence = finder.accuses(signer.signs(0, number.to_bytes(4, "big")))
            receiver.judge.cases.add(Case(evidence, 0.0, Verdict.UNPROVABLE))
        assert len(receiver.judge.cases) == MAX_KEPT
        assert proven in [case.evidence for case in receiver.judge.cases.values()]

    play(3, scenario, judging=0)


@pytest.mark.parametrize("forged", ["finder", "record", "pair"])
def test_the_sender_of_evidence_with_a_wrong_signature_is_quarantined(forged: str) -> None:
    """S-11"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, honest, receiver = nodes[0], nodes[1], nodes[2]
        record = honest.signs(0, bytes(BLOCK_SIZE))
        evidence = liar.accuses(record)
        if forged == "finder":
            evidence = msgspec.structs.replace(evidence, finder=nodes[3].own)
        elif forged == "record":
            evidence = liar.accuses(msgspec.structs.replace(record, sha256=bytes(32)))
        else:
            evidence = liar.accuses(record, honest.signs(1, bytes(BLOCK_SIZE)))
        with pytest.raises((UnavailableError, PeerUnavailableError)):
            await liar.tells(receiver, evidence)
        assert set(receiver.view.quarantined) == {liar.own}
        assert not receiver.judge.cases

    play(4, scenario)


def test_an_accusation_is_kept_and_no_member_quarantined_while_the_registry_is_down() -> None:
    """S-12"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, finder, receiver = nodes[0], nodes[1], nodes[2]
        record, registry.down = liar.signs(0, bytes(BLOCK_SIZE)), True
        await finder.tells(receiver, finder.accuses(record))
        await trio.sleep(5 * RETRY_S)
        assert not receiver.view.quarantined
        assert verdicts([receiver], liar) == [Verdict.UNPROVEN]
        registry.down = False
        await until(lambda: receiver.view.is_quarantined(liar.own), RETRY_S + 1)
        assert verdicts([receiver], liar) == [Verdict.PROVEN]
        assert registry.asked == Counter([0, *range(REF.block_count)]), "the accused block, then all of the object"

    play(3, scenario)


def test_evidence_about_an_object_that_the_registry_refuses_stays_unproven() -> None:
    """S-12"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, finder, receiver = nodes[0], nodes[1], nodes[2]
        record, registry.private = liar.signs(0, bytes(BLOCK_SIZE)), True
        await finder.tells(receiver, finder.accuses(record))
        await trio.sleep(SOON_S)
        assert verdicts([receiver], liar) == [Verdict.UNPROVABLE]
        assert not receiver.view.quarantined

    play(3, scenario)


def test_no_member_quarantines_a_member_deceived_by_a_mirror() -> None:
    """S-13"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        deceived, finder, receiver = nodes[0], nodes[1], nodes[2]
        receiver.mirrored, receiver.registry.target = True, WithMirror()
        await finder.tells(receiver, finder.accuses(deceived.signs(0, bytes(BLOCK_SIZE))))
        await trio.sleep(SOON_S)
        assert [case.verdict for case in receiver.judge.cases.values()] == [Verdict.VOID]
        assert not receiver.view.quarantined

    play(3, scenario, registry=WithMirror())


def test_a_node_that_holds_the_whole_object_decides_without_the_registry(tmp_path: Path) -> None:
    """S-14"""
    (tmp_path / "whole").write_bytes(BODY)

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, finder, receiver = nodes[0], nodes[1], nodes[2]
        registry.down = True
        receiver.disk.open_sealed = lambda digest: (tmp_path / "whole").open("rb")
        await finder.tells(receiver, finder.accuses(liar.signs(3, bytes(REF.block_length(3)))))
        await until(lambda: receiver.view.is_quarantined(liar.own), 1.0)
        await liar.tells(nodes[3], liar.accuses(finder.signs(0, BODY[:BLOCK_SIZE])))
        nodes[3].disk.open_sealed = lambda digest: (tmp_path / "whole").open("rb")
        await until(lambda: nodes[3].view.is_quarantined(liar.own))
        assert not registry.asked

    play(4, scenario)


def test_a_member_that_joins_later_receives_the_evidence() -> None:
    """S-15"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, finder, late = nodes[0], nodes[1], nodes[3]
        site = late.view.site
        late.view.see(member for member in site if member.peer_id == late.own)

        async def absent(peer: PeerId, request: Request) -> Answer:
            raise UnavailableError("not there yet")

        late.handler = absent
        finder.site.trust.suspect(suspicion(liar.signs(0, bytes(BLOCK_SIZE)), proven=True))
        await until(lambda: nodes[2].view.is_quarantined(liar.own))
        late.view.see(site)
        late.handler = late.handle
        await trio.lowlevel.checkpoint()
        await until(lambda: late.view.is_quarantined(liar.own), 2 * EXCHANGE_S + PAUSE_S)

    play(4, scenario)


def test_evidence_that_is_an_hour_old_is_neither_sent_nor_accepted() -> None:
    """S-16"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, finder, receiver = nodes[0], nodes[1], nodes[2]
        evidence = finder.accuses(liar.signs(0, bytes(BLOCK_SIZE)))
        await finder.blocks.questions.ask(receiver.own, Accuse(((evidence, QUARANTINE_S),)), Lane.CONTROL, 1.0)
        assert not receiver.judge.cases
        await finder.tells(receiver, evidence)
        await until(lambda: receiver.view.is_quarantined(liar.own))
        receiver.view.quarantined.clear()
        await trio.sleep(QUARANTINE_S)
        registry.asked.clear()
        await finder.tells(receiver, evidence)  # sent as new evidence: it counts once
        await trio.sleep(SOON_S)
        assert not receiver.view.quarantined
        assert not receiver.judge.cases.about(liar.own)
        assert not registry.asked

    play(3, scenario)


def test_a_liar_cannot_end_evidence_by_telling_of_it_as_old() -> None:
    """S-16"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, finder, receiver = nodes[0], nodes[1], nodes[2]
        registry.down = True
        evidence = finder.accuses(liar.signs(0, bytes(BLOCK_SIZE)))
        old = Accuse(((evidence, QUARANTINE_S - 1.0),))
        await liar.blocks.questions.ask(receiver.own, old, Lane.CONTROL, 1.0)
        await trio.sleep(2.0)
        assert not receiver.judge.cases.live()
        registry.down = False
        await finder.tells(receiver, evidence)
        await until(lambda: receiver.view.is_quarantined(liar.own))

    play(3, scenario, judging=3)


def test_a_liar_cannot_keep_evidence_out_by_accusing_itself() -> None:
    """S-16: of its false record, for the same source, as a finder that shows nothing."""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, finder, receiver = nodes[0], nodes[1], nodes[2]
        await finder.read_as_home()
        registry.private = True
        record = liar.signs(0, bytes(BLOCK_SIZE))
        await liar.tells(receiver, liar.accuses(record))
        await finder.tells(receiver, finder.accuses(record))
        await until(lambda: receiver.view.is_quarantined(liar.own))

    play(3, scenario)


def test_a_finder_that_shows_the_object_slowly_delays_other_cases_by_a_bounded_time() -> None:
    """S-10"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, slow, finder, receiver = nodes
        await finder.read_as_home()

        async def never(peer: PeerId, request: GetShards, sender: Sender) -> None:
            await trio.sleep_forever()

        slow.server = never
        registry.block_s = 1e6
        for number in range(MAX_UNDECIDED):
            await slow.tells(receiver, slow.accuses(finder.signs(number % 2, bytes([number]) * BLOCK_SIZE)))
        await finder.tells(receiver, finder.accuses(liar.signs(0, bytes(BLOCK_SIZE))))
        within_s = MAX_UNDECIDED * (SHOWING_S + READING_S) + SPREAD_S * len(nodes) + 1
        await until(lambda: receiver.view.is_quarantined(liar.own), within_s)

    play(4, scenario, judging=4)


def test_quarantine_and_evidence_survive_a_restart(tmp_path: Path) -> None:
    """S-17"""
    path = tmp_path / "evidence.msgpack"

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, finder, node = nodes[0], nodes[1], nodes[2]
        own = next(member for member in node.view.site if member.peer_id == node.own)
        wall = 1.7e9

        def clock() -> float:
            return wall + trio.current_time()

        before, file = Membership(own, 1, Random(1), passports_of(own)), EvidenceFile(path, clock)
        file.save(before, node.judge.cases)
        assert not path.exists()
        evidence = finder.accuses(liar.signs(0, bytes(BLOCK_SIZE)))
        node.judge.cases.add(Case(evidence, trio.current_time(), Verdict.PROVEN))
        before.quarantine(liar.own, "signed a false record")
        file.save(before, node.judge.cases)
        written = path.read_bytes()
        await trio.sleep(1000)
        file.save(before, node.judge.cases)
        assert path.read_bytes() == written, "an unchanged state is not written"

        after, again = Membership(own, 2, Random(2), passports_of(own)), nodes[3]
        EvidenceFile(path, clock).load(after, again.judge.cases)
        ((peer, reason, left),) = after.quarantines()
        assert (peer, reason) == (liar.own, "signed a false record")
        assert left == pytest.approx(QUARANTINE_S - 1000)
        (case,) = again.judge.cases.about(liar.own)
        assert (case.evidence, case.verdict) == (evidence, Verdict.PROVEN)

        wall += QUARANTINE_S  # the quarantine is over, or the clock jumped
        ended, last = Membership(own, 3, Random(3), passports_of(own)), nodes[4]
        EvidenceFile(path, clock).load(ended, last.judge.cases)
        assert not ended.quarantines()
        assert not last.judge.cases.about(liar.own)
        assert len(last.judge.cases) == 1, "kept, so that it does not count again"

    play(5, scenario, judging=0)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\x02\x90\x90", bytes(2 << 20), b"\x93\x01\x91\x93\xa1x\xa1y\xc0"])
def test_a_damaged_file_of_evidence_is_ignored(tmp_path: Path, data: bytes) -> None:
    """S-17"""
    path = tmp_path / "evidence.msgpack"
    path.write_bytes(data)

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        own = nodes[0].view.site[0]
        membership = Membership(own, 1, Random(1), passports_of(own))
        EvidenceFile(path).load(membership, nodes[0].judge.cases)
        assert not membership.quarantines()
        assert not nodes[0].judge.cases

    play(1, scenario, judging=0)


def test_evidence_that_was_altered_on_the_disk_is_not_passed_on(tmp_path: Path) -> None:
    """S-17: members would quarantine this node for it."""
    path = tmp_path / "evidence.msgpack"

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, finder, node = nodes
        own = next(member for member in node.view.site if member.peer_id == node.own)
        evidence = finder.accuses(liar.signs(0, bytes(BLOCK_SIZE)))
        node.judge.cases.add(Case(evidence, trio.current_time()))
        EvidenceFile(path).save(Membership(own, 1, Random(1), passports_of(own)), node.judge.cases)
        path.write_bytes(path.read_bytes().replace(evidence.signature, bytes(64)))
        EvidenceFile(path).load(Membership(own, 2, Random(2), passports_of(own)), finder.judge.cases)
        assert not finder.judge.cases

    play(3, scenario, judging=0)


KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, 4)]
ALICE, BOB, CAROL = (Identity.of(key) for key in KEYS)
GENUINE = make_evidence(
    make_record(REF, 1, bytes(32), ALICE.peer_id, sign=ALICE.sign),
    SOURCE,
    BOB.peer_id,
    BOB.sign,
    other=make_record(REF, 1, bytes([1]) * 32, ALICE.peer_id, sign=ALICE.sign),
)


@given(st.data())
def test_evidence_that_was_altered_anywhere_is_refused(data: st.DataObject) -> None:
    """S-11"""
    check_evidence(GENUINE)
    encoded = bytearray(msgspec.msgpack.encode(GENUINE))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        altered = msgspec.msgpack.decode(encoded, type=Evidence)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return
    if altered != GENUINE:
        with pytest.raises(PeerMisbehavedError):
            check_evidence(altered)


def test_a_member_cannot_accuse_in_the_name_of_another() -> None:
    """S-11"""
    for stranger in (ALICE, CAROL):
        with pytest.raises(PeerMisbehavedError):
            check_evidence(replace_finder(stranger.peer_id))


def replace_finder(finder: PeerId) -> Evidence:
    return msgspec.structs.replace(GENUINE, finder=finder)


def test_evidence_against_the_finder_itself_or_by_strangers_is_ignored() -> None:
    """S-10"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        liar, receiver = nodes[0], nodes[1]
        stranger = Identity.of(Ed25519PrivateKey.generate())
        unknown = make_record(REF, 0, bytes(32), stranger.peer_id, sign=stranger.sign)
        of_receiver = receiver.signs(0, bytes(BLOCK_SIZE))
        by_stranger = make_evidence(of_receiver, SOURCE, stranger.peer_id, stranger.sign)
        await liar.tells(receiver, liar.accuses(unknown), liar.accuses(of_receiver), by_stranger)
        assert not receiver.judge.cases

    play(2, scenario)


def test_an_unfounded_suspicion_costs_one_block_once() -> None:
    """S-13"""

    async def scenario(nodes: list[Node], registry: Registry) -> None:
        honest, reader = nodes
        record = honest.signs(0, BODY[:BLOCK_SIZE])
        for _ in range(5):
            reader.site.trust.suspect(suspicion(record, proven=False))
            await trio.sleep(1)
        assert registry.asked == Counter([0])
        assert not reader.view.quarantined

    play(2, scenario)
