"""When to try again, and when not to try at all: decisions about time. Callers pass the time and do the I/O."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential back-off with full jitter, as in Brooker, "Exponential Backoff and Jitter" (2015)."""

    name: str
    attempts: int
    """Including the first one."""
    base_s: float
    cap_s: float
    retry_after_cap_s: float = 10.0
    """If a server asks for a longer pause, the call fails at once: a client waits for the answer."""
    patience_s: float = 0.0
    """For this time from the beginning of an outage, the call waits for the breaker's next probe instead of failing."""

    def delay(self, failures: int, retry_after_s: float | None, rng: Random) -> float | None:
        """Seconds to wait after the `failures`th failure in a row; None: give up."""
        if failures >= self.attempts or (retry_after_s or 0) > self.retry_after_cap_s:
            return None
        jittered = rng.uniform(0, min(self.cap_s, self.base_s * 2.0 ** (failures - 1)))
        return max(jittered, retry_after_s or 0)


RESOLVE = RetryPolicy("resolve", attempts=3, base_s=0.2, cap_s=2.0)
"""Names and sizes: a client waits for the headers. Most clients give up after 30 s."""
BODY = RetryPolicy("body", attempts=5, base_s=0.2, cap_s=5.0, patience_s=8.0)
"""Blocks: each block received resets the count of failures, so a body may take many attempts on a bad link. A short
outage is waited out: a home that fails at once makes all readers of its blocks look elsewhere, and some of them read
the blocks themselves. The time is long enough for the probes 2 and 6 s after the first failure."""
MIRROR = RetryPolicy("mirror", attempts=2, base_s=0.1, cap_s=0.1, retry_after_cap_s=0.0)
"""A mirror: only short interruptions are worth another attempt, since another registry can be asked."""
RETRIED_STATUS = frozenset({408, 429, 502, 503, 504})
"""Statuses that concern the registry and not the object: the registry is overloaded or down."""


class Breaker:
    """Circuit breaker (Nygard, "Release It!"): after a failure all calls fail at once, for a pause that doubles.

    After the pause one call is admitted as a probe, and the next pause begins. If the probe is cancelled, another call
    becomes the probe after that pause. If another member found that the registry answers (`hinted`), the pause ends at
    once. The next hint counts after the time at which that pause would have ended: a member that lies costs at most one
    probe for each pause.
    """

    FIRST_PAUSE_S = 2.0
    LONGEST_PAUSE_S = 16.0
    LONGEST_ASKED_S = 300.0
    """A server that asks for a longer pause is tried after this time: it may recover sooner than it expected."""

    def __init__(self) -> None:
        self._failures = 0
        self._closed_until = 0.0
        self._probing = False
        self._asked_until = self._hints_from = 0.0
        self.failing_since = 0.0
        """When the outage began. Only valid while `failing`."""

    def wait_s(self, now: float) -> float:
        """0: make the call, and report its outcome. Otherwise the seconds until the next probe."""
        if not self._failures:
            return 0.0
        if now < self._closed_until:
            return self._closed_until - now
        self._probing = True
        self._closed_until = now + self._pause_s()
        return 0.0

    @property
    def probing(self) -> bool:
        return self._failures > 0 and self._probing

    @property
    def failing(self) -> bool:
        return self._failures > 0

    def rest_s(self, now: float) -> float:
        """Like `wait_s`, for display only: it admits no probe."""
        return max(0.0, self._closed_until - now) if self._failures else 0.0

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self, now: float, asked_s: float = 0.0) -> None:
        """Only the first failure among concurrent calls counts. `asked_s`: the pause that the server asks for."""
        if not self._failures:
            self.failing_since = now
        if not self._failures or self._probing:
            self._probing = False
            self._failures += 1
            self._closed_until = now + self._pause_s()
        self._asked_until = now + min(asked_s, self.LONGEST_ASKED_S)
        self._closed_until = max(self._closed_until, self._asked_until)

    def hinted(self, now: float) -> bool:
        """Another member says that the registry answers. Returns whether the pause ends for that. A pause for which the
        registry itself asked stays."""
        until = max(now, self._asked_until)
        if not self._failures or now < self._hints_from or self._closed_until <= until:
            return False
        self._hints_from, self._closed_until = self._closed_until, until
        return True

    def _pause_s(self) -> float:
        return min(self.LONGEST_PAUSE_S, self.FIRST_PAUSE_S * 2.0 ** min(self._failures - 1, 8))
