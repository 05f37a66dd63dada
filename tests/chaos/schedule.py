"""Which faults strike whom and when, and who pulls what: all of it from one seed, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Literal

Kind = Literal[
    "kill", "stop", "pause", "torn", "full disk", "liar", "lossy link", "slow link", "partition", "uplink dead",
    "uplink cut", "uplink stalled", "uplink slow", "registry 429", "registry 500", "all cold",
]  # fmt: skip

OF_A_NODE: tuple[Kind, ...] = ("kill", "stop", "pause", "torn", "full disk", "lossy link", "slow link")
OF_THE_UPLINK: tuple[Kind, ...] = (
    "uplink dead", "uplink cut", "uplink stalled", "uplink slow", "registry 429", "registry 500",
)  # fmt: skip
EXCUSES_ITS_NODE: frozenset[Kind] = frozenset({"kill", "stop", "pause", "torn", "liar"})
"""A client whose own node is gone may fail: what it pulls from is not there."""
EXCUSES_ALL: frozenset[Kind] = frozenset(
    {"uplink dead", "uplink cut", "uplink stalled", "registry 429", "registry 500", "all cold"}
)
"""What no node holds yet cannot be had."""

QUIET_S = 10.0
"""Without faults at the start, so that something is held, and at the end."""
EVERY_S = 4.0
"""Between faults of nodes, on the average; those of the uplink come half as often."""
SHORTEST_S, LONGEST_S = 2.0, 15.0
AT_ONCE = 3
"""Nodes that are disturbed at a time: of 8, five more are left than a block has shards to lose."""
PARTITIONS = 0.3
"""Of the faults that are not a node's."""
THINKING_S = 2.0
"""Between a client's pulls, on the average."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`nodes` are whom it strikes: of a partition one side, of the uplink nobody. `seed` is for what it does there."""

    start: float
    end: float
    kind: Kind
    nodes: tuple[int, ...]
    seed: int

    def excuses(self, node: int, began: float, ended: float, grace_s: float) -> bool:
        """Whether a pull of the node's client may have failed for it."""
        meets = self.start <= ended and began <= self.end + grace_s
        return meets and (self.kind in EXCUSES_ALL or (self.kind in EXCUSES_ITS_NODE and node in self.nodes))


def faults(seed: int, nodes: int, seconds: float) -> list[Fault]:
    """In the order in which they begin. No node is in two at a time; one partition and one uplink fault at a time."""
    rng = Random(f"{seed}/faults")
    last = seconds - QUIET_S
    cold = Fault(
        at := rng.uniform(0.5 * last, 0.8 * last), min(last, at + LONGEST_S), "all cold", tuple(range(nodes)), 0
    )
    lies = Fault(rng.uniform(QUIET_S, 0.3 * last), rng.uniform(0.35 * last, 0.48 * last), "liar", (nodes - 1,), 0)
    found = [cold, lies, *_of_nodes(rng, nodes - 1, last), *_of_the_uplink(rng, nodes, last)]
    # By itself: it has to be seen what the registry is asked for then.
    return sorted(
        (one for one in found if one is cold or one.end < cold.start or one.start > cold.end),
        key=lambda fault: fault.start,
    )


def _of_nodes(rng: Random, nodes: int, last: float) -> Iterator[Fault]:
    busy, now = [0.0] * nodes, QUIET_S
    while (now := now + rng.expovariate(1 / EVERY_S)) < last - SHORTEST_S:
        free = [node for node, until in enumerate(busy) if until < now]
        node, end = rng.choice(free or [0]), min(last, now + rng.uniform(SHORTEST_S, LONGEST_S))
        kind, what = rng.choice(OF_A_NODE), rng.getrandbits(32)
        if nodes - len(free) < min(AT_ONCE, nodes // 2):
            busy[node] = end + LONGEST_S
            yield Fault(now, end, kind, (node,), what)


def _of_the_uplink(rng: Random, nodes: int, last: float) -> Iterator[Fault]:
    now = QUIET_S
    while (now := now + rng.expovariate(1 / (2 * EVERY_S))) < last - SHORTEST_S:
        end = min(last, now + rng.uniform(SHORTEST_S, LONGEST_S))
        if rng.random() < PARTITIONS:
            side = tuple(sorted(rng.sample(range(nodes), rng.randint(1, nodes // 2))))
            yield Fault(now, end, "partition", side, 0)
        else:
            yield Fault(now, end, rng.choice(OF_THE_UPLINK), (), 0)
        now = end


def pulls(seed: int, node: int, tags: Sequence[str]) -> Iterator[tuple[float, str]]:
    """Seconds to wait, and what to pull then: some images are wanted far more often than others."""
    rng = Random(f"{seed}/client/{node}")
    weights = [1 / rank for rank in range(1, len(tags) + 1)]
    for _ in count():
        yield rng.expovariate(1 / THINKING_S), rng.choices(tags, weights)[0]
