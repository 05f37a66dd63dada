"""Which of two ways a node takes to bytes that it lacks: from its site, or from the registry itself.

The way through the site reads each block over the uplink once, whatever that costs in time. Where a registry is fast
and processors are few, each node for itself may be faster. What a way would take is estimated from what it gave lately:
its time to the first byte, and its bytes per second while it was in use. The registry's figures come for nothing from
the blocks that this node reads as their home, so no read is made only to measure it. While the registry is preferred,
one read of PROBE_EVERY goes through the site.

What one node prefers, others prefer too, and they share the uplink. It is at least as fast as the most that this node
ever got from it at a time. The registry is preferred only if a part of that for each node is faster than the site:
then it is faster even if all nodes do the same.

A registry that pushes back (429, 503, failures, a growing time to the first byte) is left at once, for a pause that
doubles. So is one of which too little is known. Against an uplink's budget the registry is never preferred.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

HALF_S = 4.0
"""Seconds in use after which what a way gave counts half."""
FRESH_S = 60.0
"""What a way gave longer ago says nothing about now."""
LEAST_READS = 4
"""Reads of a way before there is an estimate: the first ones meet cold connections."""
MARGIN = 1.5
"""The registry must be that much faster."""
PROBE_EVERY = 16
FIRST_PAUSE_S, LONGEST_PAUSE_S = 30.0, 600.0
GROWN_FACTOR, GROWN_S = 4.0, 0.5
"""A time to the first byte beyond GROWN_FACTOR times the usual one, and GROWN_S more than it, has grown. If that of the
site is as long, this node is what is slow."""
PEAK_BYTES, _PEAK_FADE = 1 << 18, 0.98
"""Least bytes of a read that may show a peak, which fades with each read."""
_GAIN, _CREEP = 0.25, 1.02
"""The mean moves by _GAIN towards each time. The usual time is the least one, which rises by _CREEP with each read."""


class Way(StrEnum):
    SITE = "site"
    REGISTRY = "registry"


class Reason(StrEnum):
    PREFERRED = "it is preferred"
    BUDGET = "the uplink has a budget"
    PUSHED_BACK = "the registry pushed back"
    UNKNOWN = "too little is known"
    SOONER = "it takes less time"
    PROBE = "to measure it"


@dataclass(frozen=True, slots=True)
class Choice:
    way: Way
    reason: Reason

    @property
    def text(self) -> str:
        """For `p2pctl why`; "" if the configuration leaves no choice."""
        return "" if self.reason is Reason.PREFERRED else f"{self.way}: {self.reason}"


class Reading:
    """A read of `length` bytes by one way. `came` is called as bytes arrive, `ended` once, whatever happened."""

    __slots__ = ("_began", "_first_s", "_gauge", "_left", "_total")

    def __init__(self, gauge: Gauge, length: int, now: float) -> None:
        self._gauge, self._left, self._began = gauge, length, now
        self._first_s: float | None = None
        self._total = gauge.total
        self._gauge.advance(now)
        self._gauge.reads += 1
        self._gauge.owed += length

    def came(self, count: int, now: float) -> None:
        count = min(count, self._left)
        self._gauge.advance(now)
        if self._first_s is None and count:
            self._first_s = now - self._began
            self._gauge.first_came(self._first_s)
        self._left -= count
        self._gauge.owed -= count
        self._gauge.bytes += count
        self._gauge.total += count

    def ended(self, now: float) -> None:
        self._gauge.advance(now)
        self._gauge.reads -= 1
        self._gauge.owed -= self._left
        self._left = 0
        self._gauge.got(self._gauge.total - self._total, now - self._began)


class Gauge:
    """What one way gave lately. `now` is monotonic seconds."""

    def __init__(self) -> None:
        self.reads = self.owed = 0
        """Reads under way, and the bytes that they still lack."""
        self.bytes, self.total = 0.0, 0
        """What came lately, fading with time in use, and in all."""
        self.peak = 0.0
        """The most bytes per second that came during a read, by all reads: what the way can give at least."""
        self._in_use_s = 0.0
        self._at = -math.inf
        self._firsts = 0
        self.first_s = self._usual_s = 0.0
        """Mean and usual time to the first byte."""
        self._first_at = -math.inf

    def begin(self, length: int, now: float) -> Reading:
        return Reading(self, length, now)

    def advance(self, now: float) -> None:
        """Count the time in use until `now`. Idle time counts nothing."""
        if self.reads and now > self._at:
            took_s = now - self._at
            kept = 0.5 ** (took_s / HALF_S)
            self.bytes *= kept
            self._in_use_s = self._in_use_s * kept + took_s
        self._at = now

    def first_came(self, after_s: float) -> None:
        if self._at - self._first_at > FRESH_S:
            self.forget()
        first = not self._firsts
        self._firsts += 1
        self._first_at = self._at
        self.first_s = after_s if first else self.first_s + _GAIN * (after_s - self.first_s)
        self._usual_s = after_s if first else min(_CREEP * self._usual_s, after_s)

    def got(self, count: int, within_s: float) -> None:
        """`count` bytes came during a read of that time."""
        if count >= PEAK_BYTES and within_s > 0:
            self.peak = max(_PEAK_FADE * self.peak, count / within_s)

    def knows(self, now: float) -> bool:
        return self._firsts >= LEAST_READS and now - self._first_at <= FRESH_S and self._in_use_s > 0

    @property
    def has_grown(self) -> bool:
        """Whether the time to the first byte is far above the usual one."""
        return self.first_s > max(GROWN_FACTOR * self._usual_s, self._usual_s + GROWN_S)

    @property
    def rate(self) -> float:
        """Bytes per second in use; 0 if nothing is known."""
        return self.bytes / self._in_use_s if self._in_use_s else 0.0

    def seconds(self, length: int) -> float:
        """How long a read of `length` bytes would take from now on, behind those under way."""
        return self.first_s + (self.owed + length) / self.rate if self.rate else math.inf

    def forget(self) -> None:
        """Measure anew. Reads under way go on."""
        self._firsts = 0
        self.bytes = self._in_use_s = self.peak = 0.0


ALWAYS_SITE = Choice(Way.SITE, Reason.PREFERRED)


class Ways:
    """The two ways to one registry's objects. `chosen` counts the choices."""

    def __init__(self) -> None:
        self.site, self.registry = Gauge(), Gauge()
        self.chosen: Counter[Choice] = Counter()
        self._pause_s, self._left_until, self._pushed_at = 0.0, -math.inf, -math.inf
        self._since_probe = 0

    def choose(
        self, length: int, now: float, *, nodes: int = 1, pushed_at: float = -math.inf, budget: bool = False
    ) -> Choice:
        """The way for a read of `length` bytes. `nodes` of the site share the uplink. `pushed_at`: when the registry
        last refused or failed to answer. `budget`: its uplink has a limit of bytes."""
        choice = Choice(Way.SITE, Reason.BUDGET) if budget else self._choose(length, now, nodes, pushed_at)
        self.chosen[choice] += 1
        return choice

    def _choose(self, length: int, now: float, nodes: int, pushed_at: float) -> Choice:
        is_slow = self.registry.knows(now) and self.registry.has_grown and self.registry.first_s > self.site.first_s
        if pushed_at > self._pushed_at or is_slow:
            self._pushed_at = max(self._pushed_at, pushed_at)
            self._leave(now)
        if now < self._left_until:
            return Choice(Way.SITE, Reason.PUSHED_BACK)
        if not self.site.knows(now) or not self.registry.knows(now):
            return Choice(Way.SITE, Reason.UNKNOWN)
        is_wide = self.registry.peak / max(1, nodes) > MARGIN * self.site.rate
        if not is_wide or MARGIN * self.registry.seconds(length) >= self.site.seconds(length):
            return Choice(Way.SITE, Reason.SOONER)
        self._since_probe += 1
        if self._since_probe >= PROBE_EVERY:
            self._since_probe = 0
            return Choice(Way.SITE, Reason.PROBE)
        return Choice(Way.REGISTRY, Reason.SOONER)

    def _leave(self, now: float) -> None:
        """A pause that comes soon after the one before is twice as long. Afterwards the registry is measured anew."""
        again = now < self._left_until + LONGEST_PAUSE_S
        if now >= self._left_until:
            self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s) if again and self._pause_s else FIRST_PAUSE_S
        self._left_until = now + self._pause_s
        self.registry.forget()
