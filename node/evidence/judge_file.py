"""Keeps quarantines and evidence across restarts, in one bounded file. Bytes: docs/FORMATS.md, "Quarantine"."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import trio

from node.evidence.cases import MAX_KEPT, Case, Cases, Verdict
from node.membership.membership import QUARANTINE_S, Membership
from node.runtime.state_files import load, save
from protocol.errors import PeerMisbehavedError
from protocol.evidence import Evidence, check_evidence
from protocol.ids import PeerId

log = logging.getLogger(__name__)

MAX_QUARANTINES, MAX_REASON = 1024, 300
MAX_FILE = 1 << 20
"""Bytes: enough for MAX_QUARANTINES and MAX_KEPT rows with texts as long as the wire allows."""
SAVE_EVERY_S = 5.0


class _Quarantine(msgspec.Struct, frozen=True, array_like=True):
    peer: PeerId
    reason: str
    until: float


class _Kept(msgspec.Struct, frozen=True, array_like=True):
    evidence: Evidence
    found_at: float
    verdict: Verdict


class _File(msgspec.Struct, frozen=True, array_like=True):
    version: Literal[1]
    quarantines: tuple[_Quarantine, ...]
    evidence: tuple[_Kept, ...]


class EvidenceFile:
    """Times in the file are Unix times. If the clock jumps, a quarantine ends early, or after QUARANTINE_S at most."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._written: tuple[set[tuple[PeerId, str]], set[tuple[Evidence, Verdict]]] = set(), set()

    def load(self, membership: Membership, cases: Cases) -> None:
        read = load(self._path, _File, MAX_FILE, "the evidence kept")
        if read is None:
            return
        now, here = self._clock(), trio.current_time()
        for row in read.quarantines[:MAX_QUARANTINES]:
            if 0 < row.until - now <= QUARANTINE_S:
                membership.quarantine(row.peer, row.reason, row.until - now)
        for kept in read.evidence[:MAX_KEPT]:
            try:
                check_evidence(kept.evidence)
            except PeerMisbehavedError as error:
                log.warning("%s: %s: dropped, because members would blame this node for it", self._path, error)
                continue
            cases.add(Case(kept.evidence, here - max(0.0, now - kept.found_at), kept.verdict))

    def save(self, membership: Membership, cases: Cases) -> None:
        """Write the file if a quarantine began or ended, or a verdict changed, since it was last written."""
        quarantines = membership.quarantines()[:MAX_QUARANTINES]
        state = (
            {(peer, reason) for peer, reason, _ in quarantines},
            {(case.evidence, case.verdict) for case in cases.values()},
        )
        if state == self._written:
            return
        now, here = self._clock(), trio.current_time()
        data = msgspec.msgpack.encode(
            _File(
                1,
                tuple(_Quarantine(peer, reason[:MAX_REASON], now + left) for peer, reason, left in quarantines),
                tuple(_Kept(case.evidence, now + case.found_at - here, case.verdict) for case in cases.values()),
            )
        )
        if save(self._path, data, "the evidence kept"):
            self._written = state

    async def run(
        self, membership: Membership, cases: Cases, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        self.load(membership, cases)
        task_status.started()
        try:
            while True:
                await trio.sleep(SAVE_EVERY_S)
                self.save(membership, cases)
        finally:
            self.save(membership, cases)
