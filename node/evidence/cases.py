"""The evidence that a node has received or made, and its verdicts on it, in a bounded table.

Evidence counts for QUARANTINE_S. Then it stays until the table is full, so that repeated evidence does not count again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import trio

from node.membership.membership import QUARANTINE_S
from protocol.evidence import Evidence
from protocol.ids import PeerId
from protocol.records import Record
from protocol.wire import MAX_TOLD

MAX_KEPT = 256
MAX_UNDECIDED = 4
"""Undecided cases of one finder: the first of them already shows whether the finder accuses falsely."""

Key = tuple[bytes, str]
"""A record is judged once for each source from which it is said to be read, whichever member accuses."""


def key_of(record: Record, source: str) -> Key:
    return record.signature, source


class Verdict(StrEnum):
    """This node's verdict on a piece of evidence."""

    SUSPECTED = "suspected here"
    """By this node's own reads. Others do not hear of it before it is proven."""
    UNPROVEN = "not proven here yet"
    UNPROVABLE = "cannot be proven here"
    PROVEN = "proven here"
    SPARED = "not looked into, since another one is proven"
    VOID = "void"
    """The record is true, or a mirror sends the same bytes. The case is kept, so that it is not examined twice."""
    REFUTED = "refuted by the registry"
    """As VOID, but by one block from the registry only. This proves nothing against the finder, but it is not heard
    any more for as long as evidence counts."""


@dataclass(slots=True)
class Case:
    """`found_at`, and `due`, the time from which this node examines it, are in trio's time."""

    evidence: Evidence
    found_at: float
    verdict: Verdict = Verdict.UNPROVEN
    due: float = -math.inf
    blocks: int = 0
    """Blocks of the object that this node held when it last looked."""
    spread: bool = False
    """Whether the case was already delayed once, to spread the members' questions to the registry."""

    @property
    def is_undecided(self) -> bool:
        return self.verdict in (Verdict.SUSPECTED, Verdict.UNPROVEN, Verdict.UNPROVABLE)

    @property
    def is_recent(self) -> bool:
        return trio.current_time() - self.found_at < QUARANTINE_S

    @property
    def is_live(self) -> bool:
        return self.verdict not in (Verdict.VOID, Verdict.REFUTED) and self.is_recent

    @property
    def worth(self) -> tuple[bool, bool, float]:
        return self.is_live, self.verdict is Verdict.PROVEN, self.found_at


class Cases(dict[Key, Case]):
    """Tasks that wait for a new case park in `added`."""

    def __init__(self) -> None:
        super().__init__()
        self.added = trio.lowlevel.ParkingLot()

    def add(self, case: Case) -> None:
        self[key_of(case.evidence.record, case.evidence.source)] = case
        if len(self) > MAX_KEPT:
            del self[min(self, key=lambda key: self[key].worth)]
        self.added.unpark_all()

    def told_again(self, evidence: Evidence, found_at: float) -> None:
        """The liar itself may have been the first to tell of it, as of evidence that has nearly ended."""
        case = self.get(key_of(evidence.record, evidence.source))
        if case is not None and case.evidence == evidence and case.is_undecided and found_at > case.found_at:
            case.found_at = found_at
            self.added.unpark_all()

    def live(self) -> list[Case]:
        return [case for case in self.values() if case.is_live]

    def about(self, signer: PeerId) -> list[Case]:
        return [case for case in self.live() if case.evidence.record.signer == signer]

    def takes_from(self, finder: PeerId) -> bool:
        """Whether the finder has fewer than MAX_UNDECIDED undecided cases, and the registry has refuted none of it."""
        cases = [case for case in self.values() if case.evidence.finder == finder and case.is_recent]
        if any(case.verdict is Verdict.REFUTED for case in cases):
            return False
        return sum(case.is_undecided for case in cases) < MAX_UNDECIDED

    def to_tell(self) -> tuple[tuple[Evidence, float], ...]:
        """The live evidence that is worth most, as much as fits a message, each with its age in seconds."""
        now = trio.current_time()
        told = [case for case in self.live() if case.verdict is not Verdict.SUSPECTED]
        listed = sorted(told, key=lambda case: case.worth, reverse=True)[:MAX_TOLD]
        return tuple((case.evidence, now - case.found_at) for case in listed)

    def next_due(self) -> Case | None:
        """The undecided case that is due first."""
        waiting = (case for case in self.live() if case.verdict in (Verdict.SUSPECTED, Verdict.UNPROVEN))
        return min(waiting, key=lambda case: case.due, default=None)

    def void_accusations_of(self, finder: PeerId) -> None:
        for case in self.values():
            if case.evidence.finder == finder and case.is_undecided:
                case.verdict = Verdict.VOID
