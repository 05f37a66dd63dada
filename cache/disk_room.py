"""The bounds of the disk store, and who makes room: the budget, and the part of the file system that stays free."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator

from cache.disk_table import MAX_RUNS, PieceTable
from cache.probation import NOTHING
from cache.runs import RUN_BLOCKS, Run
from cache.segments import PINNED
from cache.store import READ_HERE, Askers
from protocol.ids import BLOCK_SIZE, Piece

EVICTION_SHARE = 64
MAX_EVICTION = 64 << 20
"""A full store evicts budget / EVICTION_SHARE at once, so that not every put waits for a flush."""
MAX_STEP = 256 << 20
"""Bytes that one call evicts, in at most 10 ms: after the budget was reduced by more, the flushes to come continue."""
SPARE_AGE_S = 1.0
"""How old an answer of statvfs may be."""


class Room:
    """Bounds of the table: the budget, and the part of the file system that stays free: `free_share` of it, and
    `free_bytes`. `timer` in seconds."""

    def __init__(self, table: PieceTable, timer: Callable[[], float]) -> None:
        self._table, self._timer = table, timer
        self._free_share, self._free_bytes = 0.0, 0
        self._spare, self._spare_at = 0, -math.inf
        self._full_of_runs = False

    def resize(self, budget_bytes: int, free_share: float, free_bytes: int) -> None:
        self._table.policy.budget_bytes = budget_bytes if self._table.folder.usable else 0
        self._free_share, self._free_bytes = free_share, free_bytes
        self.recheck()

    def recheck(self) -> None:
        """Ask the file system again at the next check: space was given back."""
        self._spare_at = -math.inf

    def spend(self, written: int) -> None:
        self._spare -= written

    def has(self, need: int) -> bool:
        """Whether `need` more bytes, a multiple of a page, fit within all bounds."""
        fits = self._table.charged + need <= self._table.policy.budget_bytes
        return fits and self._has_runs() and need <= self._spare_bytes()

    def _has_runs(self) -> bool:
        if self._table.policy.load.entries < MAX_RUNS:
            return True
        self._warn_of_runs()
        return False

    def _warn_of_runs(self) -> None:
        if not self._full_of_runs:
            self._full_of_runs = True
            reason = ValueError(f"it holds parts of so many objects that their number ({MAX_RUNS}) bounds it")
            self._table.folder.warn_once("the cache does not fill its budget", reason)

    def _spare_bytes(self) -> int:
        """Bytes that may be written before the floor of free disk is reached; negative below it."""
        now = self._timer()
        if now - self._spare_at >= SPARE_AGE_S:
            self._spare, self._spare_at = 0, now
            try:
                disk = os.statvfs(self._table.folder.path)
                floor = max(int(self._free_share * disk.f_blocks * disk.f_frsize), self._free_bytes)
                self._spare = disk.f_bavail * disk.f_frsize - floor - self._table.queued_bytes
            except OSError as error:
                self._table.folder.warn_once("cannot tell how much disk is free", error)
        return self._spare

    def turn_over(self, need: int) -> None:
        """Remove pieces used here to make place for one of `need` bytes, if they have their full part of the room."""
        policy = self._table.policy
        budget = min(policy.budget_bytes, self._table.charged + self._spare_bytes())
        over = policy.excess(need, budget)
        if over == NOTHING:
            return
        if over.bytes <= 0:
            self._warn_of_runs()
        spare = self._extra(budget)
        target = policy.load - over
        for run in policy.turnover(need, spare, budget):
            self._give_up(run, policy.bytes - (target.bytes - spare), policy.load.entries > target.entries)

    def may_have(self, need: int, kept_for: Askers) -> bool:
        """Whether `need` bytes for this purpose can fit once others of their kind are evicted."""
        policy = self._table.policy
        shortage = max(0, policy.budget_bytes - self._table.charged - self._spare_bytes())
        return need <= policy.room(kept_for) - (shortage if kept_for else 0)

    def evict(self, need: int, kept_for: Askers = READ_HERE, *, exactly: bool = False) -> None:
        """Remove the policy's victims, so that after the next flush `need` fits, and unless `exactly`, a little more.
        At most MAX_STEP is removed."""
        table, policy = self._table, self._table.policy
        leased = sum(table.removed[piece] for piece in table.removed if table.is_leased(piece)) if table.leased else 0
        room = policy.budget_bytes - policy.bytes
        extra = 0 if exactly else self._extra(policy.room(kept_for))
        wanted = max(need + extra + leased, room + need - self._spare_bytes() - (table.removed_bytes - leased))
        wanted = min(wanted, room + MAX_STEP)
        served = sum(table.runs.bitmap(file.digest).bit_count() * BLOCK_SIZE for file in table.leased)
        for run in policy.victims(min(wanted + served, policy.budget_bytes), kept_for, entries=1):
            self._give_up(run, wanted - (policy.budget_bytes - policy.bytes), policy.load.entries >= MAX_RUNS)

    def beyond(self, target_bytes: int) -> Iterator[Piece]:
        """The pieces that would be evicted so that at most `target_bytes` are held; too few if more is pinned."""
        policy = self._table.policy
        over = policy.bytes - target_bytes
        for run in policy.victims(policy.budget_bytes - target_bytes) if over > 0 else ():
            for piece in run.pieces():
                if over <= 0:
                    return
                over -= run.space(piece.shard, 1 << piece.block.index % RUN_BLOCKS)
                yield piece

    def unused(self, before: int) -> Iterator[Piece]:
        """Pieces that are not pinned and were last used before, in Unix milliseconds."""
        runs = [run for run in self._table.runs if run.used < before and run.kept_for != PINNED]
        return (piece for run in runs for piece in run.pieces())

    def _extra(self, room: int) -> int:
        return min(room // EVICTION_SHARE, MAX_EVICTION)

    def _give_up(self, run: Run, need: int, whole: bool) -> None:
        """Remove `need` bytes of a run, or all of it, unless its object is being sent."""
        if not self._table.is_leased(run.piece(0, None)):
            self._table.give_up(run, self._table.policy.size(run) if whole else need)
