"""The schedule of a chaos run: a seed determines all faults and all pulls before the run begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Literal, get_args

NodeKind = Literal["kill", "stop", "pause", "torn", "full disk", "lossy link", "slow link"]
UplinkKind = Literal["uplink dead", "uplink cut", "uplink stalled", "uplink slow", "registry 429", "registry 500"]
Kind = Literal[NodeKind, UplinkKind, "liar", "partition", "all cold"]

OF_A_NODE: tuple[NodeKind, ...] = get_args(NodeKind)
OF_THE_UPLINK: tuple[UplinkKind, ...] = get_args(UplinkKind)
EXCUSES_ITS_NODE: frozenset[Kind] = frozenset({"kill", "stop", "pause", "torn", "liar"})
"""A client may fail while the node that it pulls through is down."""
EXCUSES_ALL: frozenset[Kind] = frozenset(
    {"uplink dead", "uplink cut", "uplink stalled", "registry 429", "registry 500", "all cold"}
)
"""A pull may need blocks that no node holds yet."""

QUIET_S = 10.0
"""Time without faults at the start, so that nodes hold some blocks, and at the end."""
EVERY_S = 4.0
"""Mean time between faults of nodes; faults of the uplink are half as frequent."""
APART_S = 5.0
"""Time between the end of the lies and the restart of all nodes: the liars have become honest nodes by then."""
SHORTEST_S, LONGEST_S = 2.0, 15.0
AT_ONCE = 3
"""Most nodes with a fault at the same time: more than the shards that a block may lose. Five of 8 nodes are left."""
PARTITIONS = 0.3
"""Share of partitions in the faults that strike no single node."""
THINKING_S = 2.0
"""Mean pause between the pulls of a client."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`nodes`: those that it strikes, a side of a partition, or none for the uplink. `seed` decides the damage."""

    start: float
    end: float
    kind: Kind
    nodes: tuple[int, ...] = ()
    seed: int = 0

    def excuses(self, node: int, began: float, ended: float, grace_s: float) -> bool:
        """Whether this fault may have made a pull through `node` fail."""
        meets = self.start <= ended and began <= self.end + grace_s
        return meets and (self.kind in EXCUSES_ALL or (self.kind in EXCUSES_ITS_NODE and node in self.nodes))


def faults(seed: int, nodes: int, seconds: float, liars: int = 1) -> list[Fault]:
    """Faults sorted by start. At any time a node has at most one fault, and the site one partition or uplink fault.

    The last `liars` nodes have no fault but that they lie, all at the same time for a part of the run.
    """
    rng = Random(f"{seed}/faults")
    last = seconds - QUIET_S
    at = rng.uniform(0.5 * last, 0.8 * last)
    cold = Fault(at, min(last, at + LONGEST_S), "all cold", tuple(range(nodes)))
    lies = [
        Fault(rng.uniform(QUIET_S, 0.3 * last), at - APART_S, "liar", (liar,), seed=rng.getrandbits(32))
        for liar in range(nodes - liars, nodes)
    ]
    drawn = [*lies, *_of_nodes(rng, nodes - liars, last), *_of_the_uplink(rng, nodes, last)]
    # No other fault overlaps the cold restart, whose load on the registry is measured alone.
    apart = [fault for fault in drawn if fault.end < cold.start or fault.start > cold.end]
    return sorted([cold, *apart], key=lambda fault: fault.start)


def _of_nodes(rng: Random, nodes: int, last: float) -> Iterator[Fault]:
    busy, now = [0.0] * nodes, QUIET_S
    while (now := now + rng.expovariate(1 / EVERY_S)) < last - SHORTEST_S:
        free = [node for node, until in enumerate(busy) if until < now]
        node, end = rng.choice(free or [0]), min(last, now + rng.uniform(SHORTEST_S, LONGEST_S))
        kind, damage = rng.choice(OF_A_NODE), rng.getrandbits(32)
        if nodes - len(free) < min(AT_ONCE, nodes // 2):
            busy[node] = end + LONGEST_S
            yield Fault(now, end, kind, (node,), seed=damage)


def _of_the_uplink(rng: Random, nodes: int, last: float) -> Iterator[Fault]:
    now = QUIET_S
    while (now := now + rng.expovariate(1 / (2 * EVERY_S))) < last - SHORTEST_S:
        end = min(last, now + rng.uniform(SHORTEST_S, LONGEST_S))
        if rng.random() < PARTITIONS:
            side = tuple(sorted(rng.sample(range(nodes), rng.randint(1, nodes // 2))))
            yield Fault(now, end, "partition", side)
        else:
            yield Fault(now, end, rng.choice(OF_THE_UPLINK))
        now = end


def pulls(seed: int, node: int, tags: Sequence[str]) -> Iterator[tuple[float, str]]:
    """Yields without end the seconds to wait and the tag to pull then. The popularity of a tag is 1/rank."""
    rng = Random(f"{seed}/client/{node}")
    weights = [1 / rank for rank in range(1, len(tags) + 1)]
    for _ in count():
        yield rng.expovariate(1 / THINKING_S), rng.choices(tags, weights)[0]
