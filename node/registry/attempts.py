"""Attempts at one registry or mirror: what a failure means, when to try again, and when not to ask at all.

A failed attempt raises FailedAttemptError. Other errors (not found, denied) are answers and pass unchanged.
`Availability` and `Attempts` apply the policies of node/registry/retry.py, and end a call with UnavailableError.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import TypeVar

import httpx
import trio

from node.registry.calls import Call
from node.registry.retry import MIRROR, RESOLVE, RETRIED_STATUS, Breaker, RetryPolicy
from protocol.errors import UnavailableError

log = logging.getLogger(__name__)

PROBE_S = 5.0
"""Longest wait for the outcome of another call's probe: as long as the longest connect."""
_T = TypeVar("_T")


@dataclass(eq=False)
class FailedAttemptError(Exception):
    """`again`: another attempt may help. `breaks`: the registry fails for all calls. `status`: of HTTP, 0 for none."""

    reason: str
    again: bool
    breaks: bool = False
    status: int = 0
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return self.reason


def unexpected(response: httpx.Response) -> FailedAttemptError:
    """The failure of an attempt for which the registry's response has an unexpected status."""
    status, after = response.status_code, response.headers.get("retry-after", "")
    busy = status in RETRIED_STATUS
    retry_after_s = float(after) if after.isascii() and after.isdigit() else None
    return FailedAttemptError(f"answered {status}", busy, breaks=busy, status=status, retry_after_s=retry_after_s)


def reason(error: Exception) -> str:
    """The cause without httpx's text, which may contain a URL: URLs of blobs contain signatures that are secret."""
    names: dict[type[Exception], str] = {
        httpx.ConnectTimeout: "no connection in time",
        httpx.ReadTimeout: "silent for too long",
        httpx.ConnectError: "cannot be reached",
        httpx.TooManyRedirects: "too many redirects",
    }
    return names.get(type(error), f"the connection broke ({type(error).__name__})")


class Availability:
    """Whether a registry or mirror can be asked now, learned from all calls to it."""

    def __init__(self, name: str, *, is_mirror: bool, rng: Random) -> None:
        self.name, self.is_mirror, self.rng = name, is_mirror, rng
        self.breaker = Breaker()
        self.problem = ""
        self.is_overloaded = False
        """Whether its last failure was an answer. Then calls fail at once: waiting ones would only add to its load."""
        self.answered_at = self.pushed_at = -math.inf
        """When it last answered, and when it last refused or failed to."""
        self.waiting = trio.lowlevel.ParkingLot()
        """Calls that wait for a probe; unparked when the registry answers, or fails for every call, or seems to answer
        again."""

    def answered(self) -> None:
        self.answered_at = trio.current_time()
        self.breaker.succeeded()
        self.waiting.unpark_all()

    def hinted(self) -> None:
        """Another member says that the registry answers."""
        if self.breaker.hinted(trio.current_time()):
            self.waiting.unpark_all()

    async def admitted(self, policy: RetryPolicy, subject: str) -> Attempts:
        """Begin a call. Raises UnavailableError if the breaker admits no call. While one call probes whether the
        registry has recovered, others wait for its outcome: the first pull after an outage makes many calls at once."""
        if wait_s := await self.let_in(policy):
            raise UnavailableError(f"{self.name}: {subject}: {self.problem}; next attempt in {wait_s:.0f} s")
        return Attempts(self, policy, subject)

    async def let_in(self, policy: RetryPolicy) -> float:
        """Wait until the breaker admits a call of this policy. Returns the seconds to its next probe if it does not."""
        while wait_s := self.breaker.wait_s(now := trio.current_time()):
            if self.breaker.probing:
                with trio.move_on_after(PROBE_S) as late:
                    await self.waiting.park()
                if late.cancelled_caught:
                    break
            elif not self.is_overloaded and now + wait_s <= self.breaker.failing_since + policy.patience_s:
                with trio.move_on_after(wait_s):
                    await self.waiting.park()
            else:
                break
        return wait_s

    async def retrying(self, call: Call, attempt: Callable[[Call], Awaitable[_T]]) -> _T:
        attempts = await self.admitted(RESOLVE, call.subject)
        while True:
            try:
                return await attempt(call)
            except FailedAttemptError as failure:
                await attempts.pause(failure)


class Attempts:
    """The attempts of one call."""

    def __init__(self, registry: Availability, policy: RetryPolicy, subject: str) -> None:
        self._registry, self._subject = registry, subject
        self._policy = MIRROR if registry.is_mirror else policy
        self._failures = 0

    def progressed(self) -> None:
        self._failures = 0

    async def pause(self, failure: FailedAttemptError) -> None:
        """Sleep until the next attempt. Raises UnavailableError if the call has no attempt left."""
        registry = self._registry
        self._failures += 1
        if failure.breaks:
            registry.pushed_at = trio.current_time()
        # A registry that keeps failing to answer gets fewer attempts than one that has answered until now.
        once_more = failure.again and not (failure.breaks and registry.breaker.failing)
        delay_s = self._policy.delay(self._failures, failure.retry_after_s, registry.rng) if once_more else None
        problem = f"{registry.name}: {self._subject}: {failure}"
        if delay_s is None:
            if failure.breaks or registry.is_mirror:
                if not registry.breaker.failing:
                    log.warning("%s is not asked for a while: %s", registry.name, failure)
                registry.problem, registry.is_overloaded = str(failure), failure.status != 0
                registry.breaker.failed(trio.current_time(), failure.retry_after_s or 0.0)
                registry.waiting.unpark_all()
                if self._policy.patience_s and not registry.is_overloaded and not await registry.let_in(self._policy):
                    return
            raise UnavailableError(problem) from failure
        log.info("%s; %s again in %.1f s", problem, self._policy.name, delay_s)
        await trio.sleep(delay_s)
