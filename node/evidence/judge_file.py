"""Quarantines and evidence across restarts, in one bounded file. Bytes: docs/FORMATS.md, "Quarantine"."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import trio

from node.evidence.judge import MAX_KEPT, Case, Judge, Verdict
from node.membership.membership import Membership
from node.membership.quarantine import QUARANTINE_S
from node.runtime.state_files import load, save
from protocol.evidence import Evidence
from protocol.ids import PeerId

MAX_QUARANTINES, MAX_REASON = 1024, 300
MAX_FILE = 1 << 20
"""That many of both at the wire's bounds of their texts."""
SAVE_EVERY_S = 5.0


class _Quarantine(msgspec.Struct, frozen=True, array_like=True):
    peer: PeerId
    reason: str
    until: float


class _Kept(msgspec.Struct, frozen=True, array_like=True):
    evidence: Evidence
    found: float
    verdict: Verdict


class _File(msgspec.Struct, frozen=True, array_like=True):
    version: Literal[1]
    quarantines: tuple[_Quarantine, ...]
    evidence: tuple[_Kept, ...]


class EvidenceFile:
    """Times in the file are Unix times; a clock that jumped can only end a quarantine early."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._written: tuple[set[tuple[PeerId, str]], set[tuple[Evidence, Verdict]]] = set(), set()

    def load(self, membership: Membership, judge: Judge) -> None:
        read = load(self._path, _File, MAX_FILE, "the evidence kept")
        if read is None:
            return
        now = self._clock()
        for one in read.quarantines[:MAX_QUARANTINES]:
            if 0 < one.until - now <= QUARANTINE_S:
                membership.quarantine(one.peer, one.reason, one.until - now)
        judge.restore(
            Case(one.evidence, trio.current_time() - max(0.0, now - one.found), one.verdict)
            for one in read.evidence[:MAX_KEPT]
        )

    def save(self, membership: Membership, judge: Judge) -> None:
        """Where anything began, ended or was decided since it was written last."""
        quarantines, cases = membership.quarantines()[:MAX_QUARANTINES], judge.cases
        state = {(peer, reason) for peer, reason, _ in quarantines}, {(one.evidence, one.verdict) for one in cases}
        if state == self._written:
            return
        now, here = self._clock(), trio.current_time()
        data = msgspec.msgpack.encode(
            _File(
                1,
                tuple(_Quarantine(peer, reason[:MAX_REASON], now + left) for peer, reason, left in quarantines),
                tuple(_Kept(one.evidence, now + one.found_at - here, one.verdict) for one in cases),
            )
        )
        if save(self._path, data, "the evidence kept"):
            self._written = state

    async def run(
        self, membership: Membership, judge: Judge, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        self.load(membership, judge)
        task_status.started()
        try:
            while True:
                await trio.sleep(SAVE_EVERY_S)
                self.save(membership, judge)
        finally:
            self.save(membership, judge)
