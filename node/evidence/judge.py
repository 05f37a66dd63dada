"""Evidence against members: found, told, checked, and kept. docs/PROTOCOL.md, "Evidence".

Nobody is quarantined on another's word. What is told is kept as unproven until this node has seen for itself, at a
bounded rate; and who accuses falsely loses the standing that he wanted to take from another.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import BinaryIO

import trio
from cachetools import LRUCache

from node.blocks.home import Home
from node.blocks.questions import Questions
from node.blocks.trust import Suspicion
from node.blocks.values import SMALL_SILENCE_S, BlockAddress, Site
from node.exchange.contract import Answer, Lane
from node.membership.membership import QUARANTINE_S
from node.oci.references import Locator
from protocol.errors import DeniedError, PeerMisbehavedError, PeerUnavailableError, ShoalError, UnavailableError
from protocol.evidence import Evidence, check_evidence, make_evidence
from protocol.ids import BLOCK_SIZE, ObjectRef, PeerId, Piece
from protocol.messages import Accusations, Accuse
from protocol.records import Record
from protocol.wire import MAX_TOLD

log = logging.getLogger(__name__)

MAX_KEPT = 256
MAX_UNDECIDED = 4
"""Of one finder: who accuses falsely is found out at the first of them."""
TELL = 8
"""Members that each tells of what it heard of first: a rumour that each passes on to so many misses one in 3000."""
EXCHANGE_S, PAUSE_S = 30.0, 5.0
SPREAD_S = 0.5
"""For each member of the site: together they ask the registry about twice a second, however many they are."""
RETRY_S = 60.0
UNDER_WAY_S = 60.0
"""After it no read that believed a liar before it was found out is still to be stored."""


class Verdict(StrEnum):
    """What this node made of a piece of evidence."""

    UNPROVEN = "not proven here yet"
    UNPROVABLE = "cannot be proven here"
    PROVEN = "proven here"
    SPARED = "not looked into, since another one is proven"
    VOID = "void"
    """The record is true, or a mirror gives the same bytes. Kept so as not to be looked into twice."""


@dataclass(slots=True)
class Case:
    """`found_at` and `due`, when it is to be looked into, in trio's time."""

    evidence: Evidence
    found_at: float
    verdict: Verdict = Verdict.UNPROVEN
    due: float = -math.inf
    spread: bool = False
    """Whether it has waited for its turn to ask the registry."""

    @property
    def is_undecided(self) -> bool:
        return self.verdict in (Verdict.UNPROVEN, Verdict.UNPROVABLE)

    def is_live(self, now: float) -> bool:
        return self.verdict is not Verdict.VOID and now - self.found_at < QUARANTINE_S


Key = tuple[bytes, str]
"""A record is judged once for each place where it is said to be read, whoever accuses."""


def key_of(record: Record, source: str) -> Key:
    return record.signature, source


class Judge:
    """`mirrored` tells of an upstream whether it has mirrors here, whose bytes may differ from the registry's."""

    def __init__(
        self, site: Site, home: Home, questions: Questions, sign: Callable[[bytes], bytes],
        mirrored: Callable[[str], bool], nursery: trio.Nursery, rng: Random,
    ) -> None:  # fmt: skip
        self._site, self._home, self._questions, self._sign, self._mirrored = site, home, questions, sign, mirrored
        self._nursery, self._rng = nursery, rng
        self._cases: dict[Key, Case] = {}
        self._cleared: LRUCache[Key, None] = LRUCache(MAX_KEPT)
        """Own suspicions that came to nothing."""
        self._heard = trio.Event()

    @property
    def cases(self) -> tuple[Case, ...]:
        return tuple(self._cases.values())

    def about(self, peer: PeerId) -> list[Case]:
        """What is held against a member, for the operator."""
        now = trio.current_time()
        return [one for one in self._cases.values() if one.evidence.record.signer == peer and one.is_live(now)]

    def restore(self, cases: Iterable[Case]) -> None:
        """What was kept when this node ran before."""
        for case in cases:
            self._keep(case)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_into)
            nursery.start_soon(self._decide)
            nursery.start_soon(self._exchange)
            live = [one for one in self._cases.values() if one.is_live(trio.current_time())]
            for signer in {one.evidence.record.signer for one in live if one.verdict is Verdict.PROVEN}:
                nursery.start_soon(self._clear, signer)
            task_status.started()

    # What others tell

    async def handle(self, peer: PeerId, request: Accuse) -> Answer:
        """For a member. Raises DeniedError to the quarantined, PeerMisbehavedError for false signatures."""
        if self._site.view.is_quarantined(peer):
            raise DeniedError("quarantined")
        await self._hear(peer, request.told)
        return Answer(Accusations(self._told()))

    async def _hear(self, teller: PeerId, told: tuple[tuple[Evidence, float], ...]) -> None:
        for evidence, age_s in told:
            if age_s >= QUARANTINE_S or not self._is_new(evidence):
                continue
            try:
                check_evidence(evidence)
            except PeerMisbehavedError as error:
                self._site.view.quarantine(teller, str(error))
                raise
            self._keep(Case(evidence, trio.current_time() - age_s))
            self._tell(evidence, teller)
            await trio.lowlevel.checkpoint()

    def _is_new(self, evidence: Evidence) -> bool:
        """And to be taken up: what is skipped here costs no signature."""
        signer, finder = evidence.record.signer, evidence.finder
        if key_of(evidence.record, evidence.source) in self._cases or signer == self._site.own:
            return False
        if self._site.view.find(signer) is None or not self._site.trust.accepts(finder):
            return False
        now = trio.current_time()
        owed = (one for one in self._cases.values() if one.is_undecided and one.is_live(now))
        return sum(one.evidence.finder == finder for one in owed) < MAX_UNDECIDED

    def _keep(self, case: Case) -> None:
        self._cases[key_of(case.evidence.record, case.evidence.source)] = case
        if len(self._cases) > MAX_KEPT:
            now = trio.current_time()
            del self._cases[min(self._cases, key=lambda key: self._worth(self._cases[key], now))]
        self._heard.set()

    @staticmethod
    def _worth(case: Case, now: float) -> tuple[bool, bool, float]:
        return case.is_live(now), case.verdict is Verdict.PROVEN, case.found_at

    # Telling

    def _told(self) -> tuple[tuple[Evidence, float], ...]:
        now = trio.current_time()
        live = [one for one in self._cases.values() if one.is_live(now)]
        live.sort(key=lambda one: self._worth(one, now), reverse=True)
        return tuple((one.evidence, now - one.found_at) for one in live[:MAX_TOLD])

    def _tell(self, evidence: Evidence, *but: PeerId) -> None:
        """Some members, once. The rest hear of it from them, and by exchanges."""
        none = {self._site.own, evidence.finder, evidence.record.signer, *but}
        others = [one.peer_id for one in self._site.view.site if one.peer_id not in none]
        for peer in self._rng.sample(others, min(TELL, len(others))):
            self._nursery.start_soon(self._ask, peer)

    async def _ask(self, peer: PeerId) -> None:
        try:
            answer = await self._questions.ask(peer, Accuse(self._told()), Lane.CONTROL, SMALL_SILENCE_S)
            if isinstance(answer.message, Accusations):
                await self._hear(peer, answer.message.told)
        except ShoalError as error:
            log.debug("evidence to %s: %s", peer, error)

    async def _exchange(self) -> None:
        while True:
            await trio.sleep(PAUSE_S)
            others = [one.peer_id for one in self._site.view.site if one.peer_id != self._site.own]
            if others:
                await self._ask(self._rng.choice(others))
                await trio.sleep(EXCHANGE_S - PAUSE_S)

    # Own suspicions

    async def _look_into(self) -> None:
        async for suspicion in self._site.trust.suspicions:
            record, key = suspicion.record, key_of(suspicion.record, suspicion.source)
            case = self._cases.get(key)
            if record.signer == self._site.own or key in self._cleared or (case is not None and not case.is_undecided):
                continue
            if suspicion.compared or await self._found_false(suspicion):
                self._accuse(suspicion)

    async def _found_false(self, suspicion: Suspicion) -> bool:
        try:
            is_false = await self._is_false(suspicion.record, suspicion.source, suspicion.other)
        except ShoalError as error:
            log.info("a suspected record of %s cannot be compared: %s", suspicion.record.block, error)
            return False
        if not is_false:
            self._cleared[key_of(suspicion.record, suspicion.source)] = None
        return is_false is True

    def _accuse(self, suspicion: Suspicion) -> None:
        evidence = make_evidence(suspicion.record, suspicion.source, self._site.own, self._sign, suspicion.other)
        case = Case(evidence, trio.current_time())
        self._keep(case)
        self._convict(case)
        self._tell(evidence)

    # Judging

    async def _decide(self) -> None:
        """One after the other, so that whatever is told costs the uplink no more than this."""
        while True:
            self._heard = trio.Event()
            now = trio.current_time()
            waiting = [one for one in self._cases.values() if one.verdict is Verdict.UNPROVEN and one.is_live(now)]
            case = min(waiting, key=lambda one: one.due, default=None)
            if case is not None and case.due <= now:
                await self._judge(case)
            else:
                with trio.move_on_at(case.due if case is not None else math.inf):
                    await self._heard.wait()

    async def _judge(self, case: Case) -> None:
        evidence, now = case.evidence, trio.current_time()
        if any(one.verdict is Verdict.PROVEN for one in self.about(evidence.record.signer)):
            case.verdict = Verdict.SPARED
            return
        try:
            if not case.spread and not self._can_tell(evidence):
                case.spread, case.due = True, now + self._rng.uniform(0, SPREAD_S * len(self._site.view.site))
                return
            is_false = await self._is_false(evidence.record, evidence.source, evidence.other)
        except (UnavailableError, PeerUnavailableError) as error:
            log.debug("%s is not proven yet: %s", evidence.record.block, error)
            case.due = now + RETRY_S
        except ShoalError as error:
            log.info("evidence about %s cannot be proven here: %s", evidence.record.block, error)
            case.verdict = Verdict.UNPROVABLE
        else:
            self._settle(case, is_false)

    def _settle(self, case: Case, is_false: bool | None) -> None:
        evidence = case.evidence
        if is_false:
            self._convict(case)
            return
        case.verdict = Verdict.VOID
        if is_false is None:
            return
        signer, block, finder = evidence.record.signer, evidence.record.block, evidence.finder
        self._site.view.quarantine(
            finder, f"accused {signer} of a record of {block.digest} #{block.index} that is true"
        )
        for one in self._cases.values():
            if one.evidence.finder == finder and one.is_undecided:
                one.verdict = Verdict.VOID

    def _convict(self, case: Case) -> None:
        case.verdict, record = Verdict.PROVEN, case.evidence.record
        log.warning("a false record", extra={"peer": record.signer, "block": record.block, "by": case.evidence.finder})
        self._site.view.quarantine(record.signer, f"signed a false record of {record.digest} #{record.index}")
        self._nursery.start_soon(self._clear, record.signer)

    async def _clear(self, signer: PeerId) -> None:
        """Drop what is held by a liar's word alone: all that is not of an object which is here whole, and right."""
        tiers = self._site.tiers
        for pause_s in (0.0, UNDER_WAY_S):
            await trio.sleep(pause_s)
            objects: dict[ObjectRef, list[Piece]] = {}
            for piece, record in tiers.signed_by(signer).items():
                objects.setdefault(record.object, []).append(piece)
            for ref, pieces in objects.items():
                if not await self._is_right(ref):
                    for piece in pieces:
                        await tiers.discard(piece)

    async def _is_right(self, ref: ObjectRef) -> bool:
        if (file := self._sealed(ref)) is not None:
            file.close()
            return True
        hasher = hashlib.new(ref.digest.algorithm)
        if self._site.tiers.holdings(ref.digest).blocks != (1 << ref.block_count) - 1:
            return False
        for index in range(ref.block_count):
            found = await self._site.tiers.get(Piece(ref.block(index)), ref.size)
            if found is None:
                return False
            hasher.update(found[0].data)
        return hasher.hexdigest() == ref.digest.hex

    def _can_tell(self, evidence: Evidence) -> bool:
        """Without asking the registry."""
        alone = not self._mirrored(Locator.parse(evidence.source).upstream)
        return (evidence.other is not None and alone) or self._own_copy(evidence.record) is not None

    async def _is_false(self, record: Record, source: str, other: Record | None) -> bool | None:
        """Whether the record, or one of the two, is; None where that is what a mirror of the registry gives."""
        locator = Locator.parse(source)
        address = BlockAddress(locator, record.object, record.index)
        mirrored = self._mirrored(locator.upstream)
        if other is not None and not mirrored:
            return True
        truth = self._own_copy(record) or (await self._home.reread(address)).data
        false = next((one for one in (record, other) if one is not None and not one.matches(truth)), None)
        if false is not None and mirrored and await self._home.deceived(address, false):
            return None
        return false is not None

    def _own_copy(self, record: Record) -> bytes | None:
        """The block's bytes, where its object is held whole and was checked against its digest."""
        file = self._sealed(record.object)
        if file is None:
            return None
        with file:
            return os.pread(file.fileno(), record.length, record.index * BLOCK_SIZE)

    def _sealed(self, ref: ObjectRef) -> BinaryIO | None:
        found = self._site.tiers.open_sealed(ref.digest)
        if found is None:
            return None
        with ExitStack() as stack:
            file = stack.enter_context(found[0])
            if os.fstat(file.fileno()).st_size != ref.size:
                return None
            stack.pop_all()
            return file
