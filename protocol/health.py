"""How well each peer has answered lately, and what that says about whom to ask and how long to wait.

Times are seconds of service: a request that was told to wait for the origin says nothing about the peer and is not
counted. Mean and deviation are exponentially weighted, as in TCP's retransmission timer (RFC 6298). What is known of a
peer that is not asked fades towards the first guess, so that one that was slow is tried again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median_low

import cachetools

from protocol.ids import PeerId

MAX_PEERS = 16384
FIRST_GUESS_S = 0.02
"""A peer nothing is known of is asked before one that is known to be slow."""
UNKNOWN_LATE_S = 2.0
"""Nothing is known either of the link that it is on."""
FADE_S = 30.0
"""After this time half is left of what was known, after three times as long nothing."""
LATE_CAP_S = 10.0
"""On a link of 4 Mbit/s eight shards of 256 KiB take 4 s: beyond that a peer is not slow, it is of no use."""
BACKOFF_FIRST_S = 3.0
"""With the silence before it about as long as the membership takes to drop a dead node: it is waited for once."""
BACKOFF_CAP_S = 30.0
UNFIT_S = 30.0
"""A node with a bad link gets no better in a moment, and trying it again costs seconds."""
LAGGARD_FACTOR, LAGGARD_S = 8.0, 2.0
"""A peer that takes so much longer than the middle one of all, and so long, had better be left out."""
QUICK_S = 0.0025
"""Where a peer takes no longer, a fifth shard beside four takes half a millisecond of the reader's link. A late one is
waited for until WARM_FLOOR_S of protocol/fetch_plan.py, which costs more if it happens to one in fifty."""
_GAIN = 0.125
_DEVIATION_GAIN = 0.25


@dataclass(slots=True)
class _Peer:
    mean_s: float = FIRST_GUESS_S
    deviation_s: float = FIRST_GUESS_S / 2
    measured: bool = False
    seen_at: float = 0.0
    outstanding: int = 0
    failures: int = 0
    avoid_until: float = 0.0
    beaten: int = 0
    last_until: float = 0.0
    unfit_until: float = 0.0
    answered_at: float = -math.inf


@dataclass(frozen=True, slots=True)
class PeerHealth:
    """What the operator sees."""

    mean_s: float
    outstanding: int
    failures: int
    avoided: bool


class Health:
    """One for each node; `now` is monotonic seconds."""

    def __init__(self) -> None:
        self._peers: cachetools.LRUCache[PeerId, _Peer] = cachetools.LRUCache(MAX_PEERS)

    def asked(self, peer: PeerId) -> None:
        self._of(peer).outstanding += 1

    def answered(self, peer: PeerId, elapsed_s: float | None, now: float) -> None:
        """The request ended well; `elapsed_s` is None where the wait was not the peer's own."""
        state = self._of(peer)
        state.outstanding = max(0, state.outstanding - 1)
        state.failures, state.avoid_until = 0, 0.0
        state.answered_at = now
        if elapsed_s is not None:
            if elapsed_s <= self.late_after_s(peer):
                state.beaten, state.last_until = 0, 0.0
            self._measured(state, elapsed_s, now)

    def _measured(self, state: _Peer, elapsed_s: float, now: float) -> None:
        if not state.measured:
            state.measured, state.seen_at = True, now
            state.mean_s, state.deviation_s = elapsed_s, elapsed_s / 2
            return
        self._fade(state, now)
        error = elapsed_s - state.mean_s
        state.mean_s += _GAIN * error
        state.deviation_s += _DEVIATION_GAIN * (abs(error) - state.deviation_s)

    def failed(self, peer: PeerId, now: float) -> None:
        """No answer in time, or a broken connection: the peer is asked last until its back-off has passed."""
        state = self._of(peer)
        state.outstanding = max(0, state.outstanding - 1)
        if now < state.avoid_until:
            return  # of requests that were under way together the first failure counts
        state.failures += 1
        state.avoid_until = now + _backoff_s(state.failures)

    def beaten(self, peer: PeerId, now: float) -> None:
        """A read went on without the peer's late answer: it lives, but is asked after the others.

        Its mean can't tell: the answers that would have raised it are those that nobody waited for.
        """
        state = self._of(peer)
        if now < state.last_until:
            return  # by several reads at once, which counts once
        state.beaten += 1
        state.last_until = now + _backoff_s(state.beaten)

    def dropped(self, peer: PeerId) -> None:
        """The request was given up because others were quicker; it says nothing new."""
        state = self._of(peer)
        state.outstanding = max(0, state.outstanding - 1)

    def overdue(self, peer: PeerId, elapsed_s: float, now: float) -> None:
        """An answer is still missing after `elapsed_s`: the mean is at least moving there."""
        state = self._of(peer)
        self._fade(state, now)
        if elapsed_s > state.mean_s:
            state.mean_s += _GAIN * (elapsed_s - state.mean_s)

    def gave_up(self, peer: PeerId, now: float) -> None:
        """As a home: it gets a block so slowly that another acts for it, and for a while for all its blocks."""
        self._of(peer).unfit_until = now + UNFIT_S

    def unfit(self, peer: PeerId, now: float) -> bool:
        """Whether another acts as home in its place."""
        state = self._peers.get(peer)
        return state is not None and now < state.unfit_until

    def answered_at(self, peer: PeerId) -> float:
        """When it last answered anything; minus infinity for never."""
        state = self._peers.get(peer)
        return -math.inf if state is None else state.answered_at

    def avoided(self, peer: PeerId, now: float) -> bool:
        state = self._peers.get(peer)
        return state is not None and now < state.avoid_until

    def order(self, peers: Iterable[PeerId], now: float) -> list[PeerId]:
        """The peer that would answer first, first; then those that were beaten or are unfit; those to avoid, last.

        Ties keep the given order.
        """

        def expected(peer: PeerId) -> tuple[bool, bool, float]:
            state = self._peers.get(peer)
            if state is None:
                return False, False, FIRST_GUESS_S
            wait_s = (state.outstanding + 1) * self._faded_s(state, now)
            return now < state.avoid_until, now < max(state.last_until, state.unfit_until), wait_s

        return sorted(peers, key=expected)

    def usable(self, peers: Iterable[PeerId], now: float) -> list[PeerId]:
        """Those of `peers`, in their order, that are fit, do not fail, and do not lag far behind the middle one of all
        that are known: two or three would make a laggard of whoever answered the first burst last."""
        means = {peer: self._faded_s(state, now) for peer, state in self._peers.items() if state.measured}
        bound = max(LAGGARD_S, LAGGARD_FACTOR * median_low(means.values())) if means else 0.0
        return [
            peer
            for peer in peers
            if means.get(peer, 0.0) <= bound and not self.avoided(peer, now) and not self.unfit(peer, now)
        ]

    def late_after_s(self, peer: PeerId) -> float:
        """The wait after which an answer is later than about 95 of 100 of this peer's."""
        state = self._of(peer)
        if not state.measured:
            return UNKNOWN_LATE_S
        return min(LATE_CAP_S, state.mean_s + 3 * state.deviation_s)

    def steady(self, peers: Iterable[PeerId]) -> bool:
        """Whether each of which anything is known takes a while, and is late in less than twice its usual time.

        Where all are asked at once, the last one is never measured: nothing is held against it.
        """
        known = [peer for peer in peers if self._of(peer).measured]
        return all(
            self._of(peer).mean_s > QUICK_S and self.late_after_s(peer) < 2 * self._of(peer).mean_s for peer in known
        )

    def report(self, peer: PeerId, now: float) -> PeerHealth:
        state = self._peers.get(peer) or _Peer()
        return PeerHealth(self._faded_s(state, now), state.outstanding, state.failures, now < state.avoid_until)

    def _fade(self, state: _Peer, now: float) -> None:
        state.mean_s, state.seen_at = self._faded_s(state, now), now

    @staticmethod
    def _faded_s(state: _Peer, now: float) -> float:
        kept = float(0.5 ** min(64.0, ((now - state.seen_at) / FADE_S) ** 2))
        return FIRST_GUESS_S + (state.mean_s - FIRST_GUESS_S) * kept

    def _of(self, peer: PeerId) -> _Peer:
        state = self._peers.get(peer)
        if state is None:
            state = self._peers[peer] = _Peer()
        return state


def _backoff_s(times: int) -> float:
    return min(BACKOFF_CAP_S, BACKOFF_FIRST_S * 2.0 ** min(times - 1, 8))


class SpareBudget:
    """A token bucket for spare requests: `share` of a token for each request, never more than `burst` saved up.

    A peer that stops owes a shard of each block that is under way: the burst is for all of them.
    """

    def __init__(self, share: float = 0.03, burst: float = 32.0) -> None:
        self._share, self._burst, self._tokens = share, burst, burst

    def earned(self, requests: int) -> None:
        self._tokens = min(self._burst, self._tokens + requests * self._share)

    def spend(self) -> bool:
        """Whether one spare may be asked now."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
