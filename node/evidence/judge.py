"""Judgement of evidence against members: evidence is found by this node or received, verified here, and passed on.

No member is quarantined on the word of another, nor on that of a registry: evidence stays unproven until this node has
compared the record with bytes that have the object's digest. They come from its own store, from the finder, or from the
registry, at a bounded rate. A member that accused falsely is itself quarantined, if that is as certain.
docs/PROTOCOL.md, "Evidence".
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import trio

from node.blocks.held_objects import is_right
from node.blocks.questions import Questions
from node.blocks.values import SMALL_SILENCE_S, Site
from node.evidence.cases import Case, Cases, Verdict, key_of
from node.evidence.findings import Finding, Findings
from node.exchange.contract import Answer, Lane
from node.membership.membership import QUARANTINE_S
from protocol.errors import (
    DeniedError,
    PeerMisbehavedError,
    PeerUnavailableError,
    ShoalError,
    UnavailableError,
)
from protocol.evidence import Evidence, check_evidence, make_evidence
from protocol.ids import PeerId
from protocol.messages import Accusations, Accuse

log = logging.getLogger(__name__)

TELL = 8
"""Members to which a node sends new evidence: if each passes it on to this many, it misses one member in 3000."""
EXCHANGE_S, PAUSE_S = 30.0, 5.0
"""Interval of the exchanges of evidence with a random member, and the wait before the first and while there is none."""
SPREAD_S = 0.5
"""A judge waits a random time, up to SPREAD_S times the number of members, before it asks the registry. So all members
together ask about twice a second, however many they are."""
RETRY_S = 60.0
PATIENCE_S, LOOK_S = 120.0, 5.0
"""How long a node that reads the object waits until it holds all of it, to decide by its own bytes; and how often it
looks whether more blocks have arrived."""
UNDER_WAY_S = 60.0
"""Time after a conviction: all reads that accepted the liar's records before it have then stored their blocks."""


@dataclass(slots=True, kw_only=True, eq=False)
class Judge:
    site: Site
    findings: Findings
    questions: Questions
    sign: Callable[[bytes], bytes]
    nursery: trio.Nursery
    rng: Random
    cases: Cases = field(default_factory=Cases)

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
            if age_s >= QUARANTINE_S:
                continue
            self.cases.told_again(evidence, trio.current_time() - age_s)
            if not self._is_acceptable(evidence):
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
        case = self.cases.get(key_of(record, evidence.source))
        if (case is not None and case.verdict is not Verdict.SUSPECTED) or record.signer in (self.site.own, finder):
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
        """Make the suspicions of this node's reads cases of its own, of which others hear once they are proven."""
        async for suspicion in self.site.trust.suspicions:
            record, source, own = suspicion.record, suspicion.source, self.site.own
            case = self.cases.get(key_of(record, source))
            if record.signer == own or (case is not None and not (suspicion.proven or case.is_undecided)):
                continue
            if case is not None and case.verdict is Verdict.PROVEN:
                continue
            evidence = make_evidence(record, source, own, self.sign, other=suspicion.other)
            case = Case(evidence, trio.current_time(), Verdict.SUSPECTED)
            if suspicion.proven:
                self.cases.add(case)
                self._convict(case)
            elif self.cases.takes_from(own):
                self.cases.add(case)

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
        source, claims = evidence.source, (evidence.record, evidence.other)
        if any(other.verdict is Verdict.PROVEN for other in self.cases.about(evidence.record.signer)):
            case.verdict = Verdict.SPARED
            return
        is_own = case.verdict is Verdict.SUSPECTED
        try:
            finding = await self.findings.held(source, *claims)
            blocks = self.findings.blocks_held(evidence.record)
            if finding is None and blocks > case.blocks and now < case.found_at + PATIENCE_S:
                case.blocks, case.due = blocks, now + LOOK_S
                return
            if finding is None and not (is_own or case.spread):
                case.spread, case.due = True, now + self.rng.uniform(0, SPREAD_S * len(self.site.view.site))
                return
            if finding is None and not is_own:
                finding = await self.findings.shown(source, *claims, finder=evidence.finder)
            self._settle(case, finding or await self.findings.by_registry(source, *claims))
        except (UnavailableError, PeerUnavailableError) as error:
            log.debug("%s is not proven yet: %s", evidence.record.block, error)
            case.due = now + RETRY_S
        except ShoalError as error:
            log.info("evidence about %s cannot be proven here: %s", evidence.record.block, error)
            case.verdict = Verdict.UNPROVABLE
            if is_own:
                del self.cases[key_of(evidence.record, source)]

    def _settle(self, case: Case, finding: Finding) -> None:
        record, finder = case.evidence.record, case.evidence.finder
        if finding is Finding.FALSE:
            self._convict(case)
            return
        case.verdict = Verdict.VOID
        if finder == self.site.own or finding is Finding.EXCUSED:
            return
        log.info("the accusation of %s by %s is unfounded", record.signer, finder)
        if finding is Finding.TRUE:
            reason = f"accused {record.signer} of a record of {record.digest} #{record.index} that is true"
            self.site.view.quarantine(finder, reason)
        else:
            case.verdict = Verdict.REFUTED
        self.cases.void_accusations_of(finder)

    def _convict(self, case: Case) -> None:
        case.verdict, record = Verdict.PROVEN, case.evidence.record
        log.warning("a false record", extra={"peer": record.signer, "block": record.block, "by": case.evidence.finder})
        self.site.view.quarantine(record.signer, f"signed a false record of {record.digest} #{record.index}")
        self.nursery.start_soon(self._clear, record.signer)
        if case.evidence.finder == self.site.own:
            self._tell(case.evidence)

    async def _clear(self, signer: PeerId) -> None:
        """Drop the blocks that a liar signed, except those of objects that are held whole and have their digest."""
        tiers = self.site.tiers
        for pause_s in (0.0, UNDER_WAY_S):
            await trio.sleep(pause_s)
            for digest in tiers.objects():
                for ref in {record.object for record in (await tiers.signed_by(signer, digest)).values()}:
                    if await is_right(tiers, ref):
                        continue
                    for piece, record in (await tiers.signed_by(signer, digest)).items():
                        if record.object == ref:
                            await tiers.discard(piece)
