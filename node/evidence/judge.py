"""Judgement of evidence against members: evidence is found by this node or received, verified here, and passed on.

No member is quarantined on the word of another. Evidence from others stays unproven until this node has compared the
record with the registry's bytes itself, at a bounded rate. A member that accused falsely is itself quarantined.
docs/PROTOCOL.md, "Evidence".
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import trio
from cachetools import LRUCache

from node.blocks.held_objects import is_right, open_checked
from node.blocks.home import Home
from node.blocks.questions import Questions
from node.blocks.trust import Suspicion
from node.blocks.values import SMALL_SILENCE_S, BlockAddress, Site
from node.evidence.cases import MAX_KEPT, Case, Cases, Key, Verdict, key_of
from node.exchange.contract import Answer, Lane
from node.membership.membership import QUARANTINE_S
from node.oci.references import Locator
from protocol.errors import DeniedError, PeerMisbehavedError, PeerUnavailableError, ShoalError, UnavailableError
from protocol.evidence import Evidence, check_evidence, make_evidence
from protocol.ids import BLOCK_SIZE, ObjectRef, PeerId, Piece
from protocol.messages import Accusations, Accuse
from protocol.records import Record

log = logging.getLogger(__name__)

TELL = 8
"""Members to which a node sends new evidence: if each passes it on to this many, it misses one member in 3000."""
EXCHANGE_S, PAUSE_S = 30.0, 5.0
"""Interval of the exchanges of evidence with a random member, and the wait before the first and while there is none."""
SPREAD_S = 0.5
"""A judge waits a random time, up to SPREAD_S times the number of members, before it asks the registry. So all members
together ask about twice a second, however many they are."""
RETRY_S = 60.0
UNDER_WAY_S = 60.0
"""Time after a conviction: all reads that accepted the liar's records before it have then stored their blocks."""


@dataclass(slots=True, kw_only=True, eq=False)
class Judge:
    """`mirrored` returns whether this node has mirrors for an upstream, whose bytes may differ from the registry's."""

    site: Site
    home: Home
    questions: Questions
    sign: Callable[[bytes], bytes]
    mirrored: Callable[[str], bool]
    nursery: trio.Nursery
    rng: Random
    cases: Cases = field(default_factory=Cases)
    _cleared: LRUCache[Key, None] = field(default_factory=lambda: LRUCache(MAX_KEPT))
    """This node's own suspicions that were wrong."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_into)
            nursery.start_soon(self._decide)
            nursery.start_soon(self._exchange)
            proven = (case.evidence.record.signer for case in self.cases.live() if case.verdict is Verdict.PROVEN)
            for signer in set(proven):
                nursery.start_soon(self._clear, signer)
            task_status.started()

    async def handle(self, peer: PeerId, request: Accuse) -> Answer:
        """Answer a member. Raises DeniedError for a quarantined one, PeerMisbehavedError for a wrong signature."""
        if self.site.view.is_quarantined(peer):
            raise DeniedError("quarantined")
        await self._hear(peer, request.told)
        return Answer(Accusations(self.cases.to_tell()))

    async def _hear(self, teller: PeerId, accusations: tuple[tuple[Evidence, float], ...]) -> None:
        for evidence, age_s in accusations:
            if age_s >= QUARANTINE_S or not self._is_acceptable(evidence):
                continue
            try:
                check_evidence(evidence)
            except PeerMisbehavedError as error:
                self.site.view.quarantine(teller, str(error))
                raise
            self.cases.add(Case(evidence, trio.current_time() - age_s))
            self._tell(evidence, teller)
            await trio.lowlevel.checkpoint()

    def _is_acceptable(self, evidence: Evidence) -> bool:
        """Whether the evidence is new, about a member, and by a trusted one. If not, no signature is checked."""
        record, finder = evidence.record, evidence.finder
        if key_of(record, evidence.source) in self.cases or record.signer == self.site.own:
            return False
        if self.site.view.find(record.signer) is None or not self.site.trust.accepts(finder):
            return False
        return self.cases.takes_from(finder)

    def _tell(self, evidence: Evidence, *but: PeerId) -> None:
        """Send evidence to TELL members once. The others receive it from them, and in exchanges."""
        none = {self.site.own, evidence.finder, evidence.record.signer, *but}
        others = [member.peer_id for member in self.site.view.site if member.peer_id not in none]
        for peer in self.rng.sample(others, min(TELL, len(others))):
            self.nursery.start_soon(self._ask, peer)

    async def _ask(self, peer: PeerId) -> None:
        try:
            answer = await self.questions.ask(peer, Accuse(self.cases.to_tell()), Lane.CONTROL, SMALL_SILENCE_S)
            if isinstance(answer.message, Accusations):
                await self._hear(peer, answer.message.told)
        except ShoalError as error:
            log.debug("evidence to %s: %s", peer, error)

    async def _exchange(self) -> None:
        while True:
            await trio.sleep(PAUSE_S)
            others = [member.peer_id for member in self.site.view.site if member.peer_id != self.site.own]
            if others:
                await self._ask(self.rng.choice(others))
                await trio.sleep(EXCHANGE_S - PAUSE_S)

    async def _look_into(self) -> None:
        async for suspicion in self.site.trust.suspicions:
            key = key_of(suspicion.record, suspicion.source)
            case = self.cases.get(key)
            if suspicion.record.signer == self.site.own or key in self._cleared or (case and not case.is_undecided):
                continue
            if suspicion.compared or await self._is_confirmed(suspicion):
                self._accuse(suspicion)

    async def _is_confirmed(self, suspicion: Suspicion) -> bool:
        try:
            is_false = await self._is_false(suspicion.record, suspicion.source, suspicion.other)
        except ShoalError as error:
            log.info("a suspected record of %s cannot be compared: %s", suspicion.record.block, error)
            return False
        if not is_false:
            self._cleared[key_of(suspicion.record, suspicion.source)] = None
        return is_false is True

    def _accuse(self, suspicion: Suspicion) -> None:
        evidence = make_evidence(suspicion.record, suspicion.source, self.site.own, self.sign, other=suspicion.other)
        case = Case(evidence, trio.current_time())
        self.cases.add(case)
        self._convict(case)
        self._tell(evidence)

    async def _decide(self) -> None:
        """Judge one case after the other, so that accusations, however many, cost a bounded part of the uplink."""
        while True:
            case = self.cases.next_due()
            if case is not None and case.due <= trio.current_time():
                await self._judge(case)
            else:
                with trio.move_on_at(case.due if case is not None else math.inf):
                    await self.cases.added.park()

    async def _judge(self, case: Case) -> None:
        evidence, now = case.evidence, trio.current_time()
        if any(other.verdict is Verdict.PROVEN for other in self.cases.about(evidence.record.signer)):
            case.verdict = Verdict.SPARED
            return
        try:
            if not case.spread and not self._needs_no_registry(evidence):
                case.spread, case.due = True, now + self.rng.uniform(0, SPREAD_S * len(self.site.view.site))
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
        if is_false:
            self._convict(case)
            return
        case.verdict = Verdict.VOID
        if is_false is None:
            return
        record, finder = case.evidence.record, case.evidence.finder
        reason = f"accused {record.signer} of a record of {record.digest} #{record.index} that is true"
        self.site.view.quarantine(finder, reason)
        self.cases.void_accusations_of(finder)

    def _convict(self, case: Case) -> None:
        case.verdict, record = Verdict.PROVEN, case.evidence.record
        log.warning("a false record", extra={"peer": record.signer, "block": record.block, "by": case.evidence.finder})
        self.site.view.quarantine(record.signer, f"signed a false record of {record.digest} #{record.index}")
        self.nursery.start_soon(self._clear, record.signer)

    async def _clear(self, signer: PeerId) -> None:
        """Drop the blocks that a liar signed, except those of objects that are held whole and have their digest."""
        tiers = self.site.tiers
        for pause_s in (0.0, UNDER_WAY_S):
            await trio.sleep(pause_s)
            objects: dict[ObjectRef, list[Piece]] = {}
            for piece, record in tiers.signed_by(signer).items():
                objects.setdefault(record.object, []).append(piece)
            for ref, pieces in objects.items():
                if not await is_right(tiers, ref):
                    for piece in pieces:
                        await tiers.discard(piece)

    def _needs_no_registry(self, evidence: Evidence) -> bool:
        alone = not self.mirrored(Locator.parse(evidence.source).upstream)
        return (evidence.other is not None and alone) or self._own_copy(evidence.record) is not None

    async def _is_false(self, record: Record, source: str, other: Record | None) -> bool | None:
        """Whether the record, or one of the two, is false; None if a mirror of the registry sends the false bytes."""
        locator = Locator.parse(source)
        address = BlockAddress(locator, record.object, record.index)
        mirrored = self.mirrored(locator.upstream)
        if other is not None and not mirrored:
            return True
        truth = self._own_copy(record) or (await self.home.reread(address)).data
        claims = (claim for claim in (record, other) if claim is not None)
        false = next((claim for claim in claims if not claim.matches(truth)), None)
        if false is not None and mirrored and await self.home.deceived(address, false):
            return None
        return false is not None

    def _own_copy(self, record: Record) -> bytes | None:
        """The block's bytes from a file of its object that was checked against its digest."""
        opened = open_checked(self.site.tiers, record.object)
        if opened is None:
            return None
        with opened[0] as file:
            return os.pread(file.fileno(), record.length, record.index * BLOCK_SIZE)
