"""Room in the disk store: a budget of bytes, and a part of the file system that has to stay free."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

from cache.disk_table import PieceTable
from cache.pieces import MAX_ENTRIES
from protocol.ids import BLOCK_SIZE

EVICTION_SHARE = 64
MAX_EVICTION = 64 << 20
"""A full store evicts budget / EVICTION_SHARE at once, so that not every put waits for a flush."""

SPARE_AGE_S = 1.0
"""How old an answer of statvfs may be."""


class Room:
    """At least `free_share` of the file system, and `free_bytes`, are left free. `timer` in seconds."""

    def __init__(self, table: PieceTable, timer: Callable[[], float]) -> None:
        self._table = table
        self._timer = timer
        self._free_share, self._free_bytes = 0.0, 0
        self._spare = 0
        self._spare_at = -math.inf

    def resize(self, budget_bytes: int, free_share: float, free_bytes: int) -> None:
        self._table.policy.budget_bytes = budget_bytes if self._table.folder.usable else 0
        self._free_share, self._free_bytes = free_share, free_bytes
        self.recheck()

    def recheck(self) -> None:
        """Ask the file system anew: space was given back."""
        self._spare_at = -math.inf

    def spend(self, written: int) -> None:
        self._spare -= written

    def has(self, need: int) -> bool:
        """Whether `need` more bytes, a multiple of a page, fit within all bounds."""
        fits = self._table.charged + need <= self._table.policy.budget_bytes
        return fits and len(self._table.entries) < MAX_ENTRIES and need <= self._spare_bytes()

    def _spare_bytes(self) -> int:
        """Bytes that may be written before the floor of free disk is reached; negative below it."""
        now = self._timer()
        if now - self._spare_at >= SPARE_AGE_S:
            self._spare, self._spare_at = self._read_spare(), now
        return self._spare

    def _read_spare(self) -> int:
        try:
            disk = os.statvfs(self._table.folder.path)
        except OSError as error:
            self._table.folder.warn_once("cannot tell how much disk is free", error)
            return 0
        floor = max(int(self._free_share * disk.f_blocks * disk.f_frsize), self._free_bytes)
        return disk.f_bavail * disk.f_frsize - floor

    def evict(self, need: int) -> None:
        """Remove the policy's victims, so that after the next flush `need` fits, and a little more."""
        table, budget = self._table, self._table.policy.budget_bytes
        leased = sum(entry.space for entry in table.removed.values() if entry.file.leases)
        room = budget - table.policy.bytes
        wanted = max(
            need + min(budget // EVICTION_SHARE, MAX_EVICTION) + leased,
            room + need - self._spare_bytes() - (table.removed_bytes - leased),
            room + (len(table.entries) >= MAX_ENTRIES),
        )
        served = sum(file.pieces * BLOCK_SIZE for file in table.files.values() if file.leases)
        for victim in table.policy.victims(min(wanted + served, budget)):
            if budget - table.policy.bytes >= wanted:
                break
            entry = table.entries.get(victim)
            if entry is not None and not entry.file.leases:
                table.remove(entry)
