"""How well each peer answered recently: which peer to ask first, and how long to wait.

Times are seconds of service: a request that waited for the upstream shows nothing about the peer and is not counted.
Mean and deviation are exponentially weighted, as in TCP's retransmission timer (RFC 6298). The estimate for a peer that
is not asked fades towards the first guess, so that a slow peer is tried again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median_low

from protocol.ids import PeerId

MAX_PEERS = 16384
"""Beyond these, the peer that was met first is forgotten."""
FIRST_GUESS_S = 0.02
"""A peer without measurements is asked before one that was slow."""
UNKNOWN_LATE_S = 2.0
"""A peer without measurements is late after this time: its link is unknown too."""
FADE_S = 30.0
"""After this time half of a measurement's weight is left, after three times as long almost nothing."""
LATE_CAP_S = 10.0
"""On a link of 4 Mbit/s eight shards of 256 KiB take 4 s: a peer beyond this is useless rather than slow."""
BACKOFF_FIRST_S = 3.0
"""With the silence before it, about the time in which the membership drops a dead node: one back-off suffices."""
BACKOFF_CAP_S = 30.0
UNFIT_S = 30.0
"""How long a slow home is replaced: a bad link does not recover in a moment, and another try costs seconds."""
LAGGARD_FACTOR, LAGGARD_S = 8.0, 2.0
"""A peer whose mean is above LAGGARD_FACTOR times the median, and above LAGGARD_S, is left out."""
QUICK_S = 0.0025
"""Up to this mean, a fifth shard beside four is cheap: it takes half a millisecond of the reader's link. Waiting for a
late one takes WARM_FLOOR_S of protocol/fetch_plan.py, which costs more if it happens once in fifty reads."""
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
    mean_s: float
    failures: int


class Health:
    """One node's view of its peers; `now` is monotonic seconds."""

    def __init__(self) -> None:
        self._peers: dict[PeerId, _Peer] = {}

    def asked(self, peer: PeerId, answers: int = 1) -> None:
        """The peer owes this many answers more."""
        self._of(peer).outstanding += answers

    def answered(self, peer: PeerId, elapsed_s: float | None, now: float) -> None:
        """The peer answered; `elapsed_s` is None if the wait was not its own."""
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
        """No answer in time, or a broken connection: the peer is asked last until its back-off ends."""
        state = self._of(peer)
        state.outstanding = max(0, state.outstanding - 1)
        if now < state.avoid_until:
            return  # requests that were under way together fail together: the first one counts
        state.failures += 1
        state.avoid_until = now + _backoff_s(state.failures)

    def beaten(self, peer: PeerId, now: float) -> None:
        """A read ended without the peer's late answer: the peer is asked after the others for a while. Its mean does
        not show the delay, because the read did not wait for the answer."""
        state = self._of(peer)
        if now < state.last_until:
            return  # several reads at once count once
        state.beaten += 1
        state.last_until = now + _backoff_s(state.beaten)

    def dropped(self, peer: PeerId, answers: int = 1) -> None:
        """So many answers were given up because others were quicker; this is no measurement."""
        state = self._of(peer)
        state.outstanding = max(0, state.outstanding - answers)

    def overdue(self, peer: PeerId, elapsed_s: float, now: float) -> None:
        """An answer is still missing after `elapsed_s`: move the mean towards it."""
        state = self._of(peer)
        self._fade(state, now)
        if elapsed_s > state.mean_s:
            state.mean_s += _GAIN * (elapsed_s - state.mean_s)

    def gave_up(self, peer: PeerId, now: float) -> None:
        """Mark `peer` unfit as home for UNFIT_S: it was too slow and another took over."""
        self._of(peer).unfit_until = now + UNFIT_S

    def unfit(self, peer: PeerId, now: float) -> bool:
        return now < self._peek(peer).unfit_until

    def answered_at(self, peer: PeerId) -> float:
        """When it last answered any request; minus infinity for never."""
        return self._peek(peer).answered_at

    def avoided(self, peer: PeerId, now: float) -> bool:
        return now < self._peek(peer).avoid_until

    def order(self, peers: Iterable[PeerId], now: float) -> list[PeerId]:
        """By expected time of the answer; peers that were beaten or are unfit come later, peers to avoid last. Ties
        keep the given order."""

        def expected(peer: PeerId) -> tuple[bool, bool, float]:
            state = self._peek(peer)
            wait_s = (state.outstanding + 1) * self._faded_s(state, now)
            return now < state.avoid_until, now < max(state.last_until, state.unfit_until), wait_s

        return sorted(peers, key=expected)

    def usable(self, peers: Iterable[PeerId], now: float) -> list[PeerId]:
        """The `peers`, in their order, that are fit, do not fail, and do not lag far behind the median of all measured
        peers. A median of only two or three would exclude the peer that answered the first burst last."""
        means = {peer: self._faded_s(state, now) for peer, state in self._peers.items() if state.measured}
        bound = max(LAGGARD_S, LAGGARD_FACTOR * median_low(means.values())) if means else 0.0
        return [
            peer
            for peer in peers
            if means.get(peer, 0.0) <= bound and not self.avoided(peer, now) and not self.unfit(peer, now)
        ]

    def late_after_s(self, peer: PeerId) -> float:
        """The wait that about 95 of 100 of this peer's answers do not exceed."""
        state = self._of(peer)
        if not state.measured:
            return UNKNOWN_LATE_S
        return min(LATE_CAP_S, state.mean_s + 3 * state.deviation_s)

    def steady(self, peers: Iterable[PeerId]) -> bool:
        """Whether each measured peer is slower than QUICK_S, and late before twice its usual time. If all are asked at
        once, the last peer is never measured, and must not count against the others."""
        states = [(self._of(peer), self.late_after_s(peer)) for peer in peers]
        return all(s.mean_s > QUICK_S and late_s < 2 * s.mean_s for s, late_s in states if s.measured)

    def report(self, peer: PeerId, now: float) -> PeerHealth:
        state = self._peek(peer)
        return PeerHealth(self._faded_s(state, now), state.failures)

    def _fade(self, state: _Peer, now: float) -> None:
        state.mean_s, state.seen_at = self._faded_s(state, now), now

    @staticmethod
    def _faded_s(state: _Peer, now: float) -> float:
        kept = float(0.5 ** min(64.0, ((now - state.seen_at) / FADE_S) ** 2))
        return FIRST_GUESS_S + (state.mean_s - FIRST_GUESS_S) * kept

    def _peek(self, peer: PeerId) -> _Peer:
        return self._peers.get(peer) or _Peer()

    def _of(self, peer: PeerId) -> _Peer:
        state = self._peers.get(peer)
        if state is None:
            if len(self._peers) >= MAX_PEERS:
                del self._peers[next(iter(self._peers))]
            state = self._peers[peer] = _Peer()
        return state


def _backoff_s(times: int) -> float:
    return min(BACKOFF_CAP_S, BACKOFF_FIRST_S * 2.0 ** min(times - 1, 8))


class SpareBudget:
    """A token bucket for spare requests: `share` of a token for each request, at most `burst` saved up. A peer that
    stops owes a shard of each block under way: the burst covers all of them."""

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
