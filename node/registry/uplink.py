"""The uplink to an upstream: limits of bytes a second and bytes a day for the whole site, outside of free hours.

Each of the site's n nodes gets an n-th part: the blocks' homes, which read from the upstream, are spread evenly. Bodies
wait for the rate in the order in which they ask (`Uplink.take`). Names never wait, but count: bodies after them wait
longer. Background bodies give way: none is read while a foreground body is read, and for QUIET_S after it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec
import trio

from node.config.quantities import local_time
from node.config.schema import UplinkPolicy
from node.runtime.state_files import load, save
from protocol.errors import UnavailableError

BURST_S = 0.25
"""Unused time that later bytes may use: an event loop that runs late must not lower the rate."""
PORTION_S = 0.125
"""Most bytes taken at once, as seconds at the rate: no body waits long behind another's portion."""
QUIET_S = 1.0
"""Pause after a foreground body before a background body: a client that reads in order soon asks again."""
SAVE_EVERY_S = 5.0
"""A process that is killed loses the count of at most this time."""
_MAX_FILE = 1 << 20


@dataclass(frozen=True, slots=True)
class UplinkUse:
    """This node's part of the limits, in bytes a second and a day, and its use of the day. `free`: in free hours."""

    rate: float
    daily: float
    used: int
    free: bool

    @property
    def spent(self) -> bool:
        return bool(self.daily) and self.used >= self.daily and not self.free


@dataclass(frozen=True, slots=True)
class Taken:
    """Bytes that may be read now, and whether they count. They do not in free hours, or if there is no limit."""

    count: int
    counted: bool


class MakeWayError(Exception):
    """A background body must be closed because a foreground body is read. It continues later where it stopped."""


Nodes = Callable[[], int]
Clock = Callable[[], datetime]


class Uplink:
    def __init__(
        self, name: str, policy: UplinkPolicy | None = None, *, sharing: Nodes = lambda: 1, clock: Clock = local_time
    ) -> None:
        """`sharing` returns the number of nodes of the site, `clock` the local time, for days and free hours."""
        self.name, self.policy = name, policy or UplinkPolicy()
        self._sharing, self._clock = sharing, clock
        self._paid_until = float("-inf")
        self._day, self._used = "", 0
        self._foreground = 0
        self._quiet_at = float("-inf")
        self._idle = trio.lowlevel.ParkingLot()
        self._changed = trio.Event()

    def change(self, policy: UplinkPolicy) -> None:
        """Bodies that wait for the old rate proceed at once, each with one portion."""
        if policy != self.policy:
            self.policy, self._paid_until = policy, float("-inf")
            self._changed.set()
            self._changed = trio.Event()

    def use(self) -> UplinkUse:
        now, share = self._clock(), max(1, self._sharing())
        return UplinkUse(self.policy.rate / share, self.policy.daily / share, self._used_on(now), self.policy.free(now))

    def restore(self, day: str, used: int) -> None:
        """Continue with the bytes used on a day before a restart."""
        self._day, self._used = day, used

    def day(self) -> tuple[str, int]:
        """The arguments of `restore`."""
        self._used_on(self._clock())
        return self._day, self._used

    # Bodies

    def check(self, *, background: bool) -> None:
        """Raises UnavailableError if no body may be read now."""
        if not self.policy.limited and not background:
            return
        use = self.use()
        if use.spent and (background or self.policy.refuse):
            raise UnavailableError(
                f"{self.name}: the uplink budget of the day is spent: {use.used} bytes of this node's {use.daily:.0f}"
            )
        if background and self.policy.hours and not use.free:
            raise UnavailableError(f"{self.name}: read in the background only in the hours of its [[upstream]]")

    async def take(self, wanted: int, *, background: bool = False) -> Taken:
        """Wait until some of `wanted` bytes may be read; `came` must follow. Raises UnavailableError, MakeWayError."""
        if background and self._foreground:
            raise MakeWayError
        if not self.policy.limited and not background:
            return Taken(wanted, False)
        self.check(background=background)
        use = self.use()
        if use.daily and not use.free and (background or self.policy.refuse):
            wanted = min(wanted, max(1, int(use.daily) - use.used))
        if use.rate and not use.free:
            wanted = min(wanted, max(1, int(use.rate * PORTION_S)))
        taken = Taken(wanted, not use.free)
        due = self._reserve(taken.count if taken.counted else 0, use.rate)
        try:
            if due > trio.current_time():
                with trio.move_on_at(due):
                    await self._changed.wait()
        except BaseException:
            self.came(taken, 0)
            raise
        return taken

    def came(self, taken: Taken, count: int) -> None:
        """Note that `count` bytes were read of those taken, and give back the rest."""
        if taken.counted and count != taken.count:
            self._reserve(count - taken.count, self.use().rate)

    def note(self, count: int) -> None:
        """Charge bytes that were read without waiting, for a name."""
        if self.policy.limited and not (use := self.use()).free:
            self._reserve(count, use.rate)

    def _reserve(self, count: int, rate: float) -> float:
        """Count bytes, which may be negative. Returns the time when they may be read."""
        self._used = max(0, self._used + count)
        if not rate or not count:
            return 0.0
        now = trio.current_time()
        due = max(self._paid_until, now - BURST_S)
        self._paid_until = due + count / rate
        return due

    def _used_on(self, now: datetime) -> int:
        day = now.date().isoformat()
        if day != self._day:
            self._day, self._used = day, 0
        return self._used

    # Foreground before background

    @contextmanager
    def foreground(self) -> Iterator[None]:
        """Mark the time in which a body is read that a client waits for."""
        self._foreground += 1
        try:
            yield
        finally:
            self._foreground -= 1
            self._quiet_at = trio.current_time() + QUIET_S
            if not self._foreground:
                self._idle.unpark_all()

    async def turn(self) -> None:
        """Wait until a background body may begin. Raises UnavailableError if the limits forbid it now."""
        while True:
            self.check(background=True)
            if self._foreground:
                await self._idle.park()
            elif trio.current_time() < self._quiet_at:
                await trio.sleep_until(self._quiet_at)
            else:
                return


class _File(msgspec.Struct, frozen=True, array_like=True):
    version: Literal[1]
    days: tuple[tuple[str, str, int], ...]
    """Upstream, day, and bytes used."""


class UplinkFile:
    """The use of the day, kept across restarts. Format: docs/FORMATS.md, "Use of the uplink"."""

    def __init__(self, path: Path, uplinks: Collection[Uplink]) -> None:
        """`uplinks` and their policies may change."""
        self._path, self._uplinks = path, uplinks
        self._written = _encoded([])

    def load(self) -> None:
        file = load(self._path, _File, _MAX_FILE, "the uplink's use")
        days = {upstream: (day, max(0, used)) for upstream, day, used in file.days} if file else {}
        for uplink in self._uplinks:
            if uplink.name in days:
                uplink.restore(*days[uplink.name])

    def save(self) -> None:
        data = _encoded([uplink for uplink in self._uplinks if uplink.policy.daily])
        if data != self._written and save(self._path, data, "the uplink's use"):
            self._written = data

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self.load()
        task_status.started()
        try:
            while True:
                await trio.sleep(SAVE_EVERY_S)
                self.save()
        finally:
            self.save()


def _encoded(uplinks: Collection[Uplink]) -> bytes:
    return msgspec.msgpack.encode(_File(1, tuple((uplink.name, *uplink.day()) for uplink in uplinks)))
