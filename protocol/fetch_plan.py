"""Reading one coded block: which keepers to ask for which shards, and when to ask one more.

A plan is told what happened and returns the requests still to be made. It ends when k distinct shards of one record
are there, or when nobody is left to ask. Asking k and a spare for the late one: "On-demand Container Loading in AWS
Lambda" (USENIX ATC'23), section 3.2; when to stop waiting: Dean and Barroso, "The Tail at Scale" (CACM 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.ids import PeerId


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask `peer` for shard `want`; `exact`: another shard would not help."""

    peer: PeerId
    want: int
    exact: bool = False


class ShardPlan:
    """`order` is the keepers, the best to ask first; the rank of a keeper is the shard that it keeps."""

    def __init__(self, keepers: Sequence[PeerId], order: Sequence[PeerId], k: int) -> None:
        self._rank = {peer: rank for rank, peer in enumerate(keepers)}
        self._left = list(order)
        self._k = k
        self._asked: dict[PeerId, int] = {}
        self._have: dict[int, PeerId] = {}
        self.retries = 0

    @property
    def done(self) -> bool:
        return len(self._have) >= self._k

    @property
    def stuck(self) -> bool:
        """Nobody is left who could bring what is missing."""
        return not self.done and not self._asked and not self._left

    def start(self, urgent: bool) -> list[Ask]:
        """The first requests: k of the keepers, or all at once where a client waits for this very block."""
        return self._next(len(self._left) if urgent else self._k)

    def got(self, peer: PeerId, index: int) -> list[Ask]:
        """A good shard came; when it was there already, the peer is asked once more for exactly its own."""
        want = self._asked.pop(peer)
        if index not in self._have:
            self._have[index] = peer
            return []
        self.retries += 1
        if want not in self._have and want != index and want not in self._asked.values():
            self._asked[peer] = want
            return [Ask(peer, want, exact=True)]
        return self._top_up()

    def failed(self, peer: PeerId) -> list[Ask]:
        """The peer will not bring its shard; the next one is asked, whatever the spare budget says."""
        self._asked.pop(peer, None)
        self.retries += 1
        return self._top_up()

    def late(self) -> list[Ask]:
        """A shard is late and the budget allows a spare."""
        return self._next(1)

    def _top_up(self) -> list[Ask]:
        return self._next(self._k - len(self._have) - len(self._asked))

    def _next(self, count: int) -> list[Ask]:
        asks = []
        for _ in range(max(0, count)):
            if not self._left:
                break
            peer = self._left.pop(0)
            self._asked[peer] = self._rank[peer]
            asks.append(Ask(peer, self._rank[peer]))
        return asks
