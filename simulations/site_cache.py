"""What a site reads from the registry in the long run, when its nodes with full caches keep blocks for each other.

This is a model on the shipped eviction policy (`cache/segments.py`), without bytes, time and failures: an object is one
block, and each of its keepers, its home among them, is asked for a shard. It is compared with one LRU-K for all pieces,
in which a node does not distinguish what it keeps for others.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from random import Random

import click

from cache.segments import SegmentedPolicy
from cache.store import READ_HERE, Askers
from protocol.ids import BlockId, Digest, PeerId, Piece, Shard
from simulations.run import Report, with_progress

K, M = 4, 1
WHOLE, PART = 4, 1
"""Sizes of a block and of a shard, in shards."""
INTERVAL_S = 60.0
WARM_UP = 3
"""The first 1 / WARM_UP of the reads fills the caches, and is not counted."""


@dataclass
class Node:
    """A store, and the bounds that it keeps. If it is not `segmented`, all pieces are as if they were used here."""

    peer: PeerId
    policy: SegmentedPolicy[Piece]
    segmented: bool
    held: set[Piece] = field(default_factory=set)

    def put(self, piece: Piece, kept_for: Askers) -> None:
        size = PART if piece.shard else WHOLE
        kept_for = kept_for if self.segmented else READ_HERE
        if kept_for:
            self.policy.wanted(size)
        if piece in self.held or size > self.policy.room(kept_for):
            return
        if not kept_for:
            self._remove(self.policy.turnover(size))
        self._remove(self.policy.victims(size, kept_for, entries=1))
        self.policy.add(piece, size, kept_for)
        self.held.add(piece)

    def use(self, piece: Piece) -> bool:
        """Whether the piece is held."""
        if piece in self.held:
            self.policy.refer(piece)
        return piece in self.held

    def read(self, piece: Piece, shards: list[Piece]) -> None:
        """A client reads a block, which makes its shards redundant."""
        self._remove([shard for shard in shards if shard in self.held])
        if piece in self.held:
            self.policy.claim(piece)
        else:
            self.put(piece, READ_HERE)

    def _remove(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self.policy.remove(piece)
            self.held.discard(piece)


class Site:
    def __init__(self, count: int, objects: int, percent: float, rng: Random, *, segmented: bool) -> None:
        self.now = 0.0
        size = round(objects * percent / 100) * WHOLE
        self._nodes = [
            Node(PeerId(f"node-{n}"), SegmentedPolicy(lambda: self.now, size), segmented) for n in range(count)
        ]
        blocks = [BlockId(Digest("sha256", f"{number:064x}"), 0) for number in range(objects)]
        self._wholes = [Piece(block) for block in blocks]
        self._shards = [[Piece(block, Shard(K, M, index)) for index in range(K + M)] for block in blocks]
        self._keepers = [rng.sample(self._nodes, K + M) for _ in blocks]

    def read(self, number: int, reader: int) -> bool:
        """Whether the registry was asked."""
        node, keepers = self._nodes[reader], self._keepers[number]
        whole, shards = self._wholes[number], self._shards[number]
        if node.use(whole):
            node.read(whole, shards)
            return False
        lacking = [
            (keeper, shard)
            for keeper, shard in zip(keepers, shards, strict=True)
            if not keeper.use(whole) and not keeper.use(shard)
        ]
        asked = False
        if len(lacking) > M:
            asked = not any(whole in other.held for other in self._nodes)
            home, *_ = keepers
            if home is not node:
                through = next(keeper for keeper in keepers if keeper not in (home, node))
                home.put(whole, (through.peer, node.peer))
            for keeper, shard in lacking:
                if keeper not in (home, node):
                    keeper.put(shard, (node.peer,))
        node.read(whole, shards)
        return asked


@dataclass(frozen=True, slots=True)
class Row:
    size_percent: float
    """Size of a node's cache, in percent of all objects."""
    one_lru_k: float
    segmented: float
    """Reads by clients that asked the registry, in percent."""


def run(seed: int, count: int, objects: int, reads: int, percents: tuple[float, ...], report: Report) -> list[Row]:
    weights = list(accumulate(1 / rank for rank in range(1, objects + 1)))
    done = 0

    def share(percent: float, segmented: bool) -> float:
        nonlocal done
        rng = Random(f"site cache {seed}")
        site = Site(count, objects, percent, rng, segmented=segmented)
        asked = 0
        for turn, number in enumerate(rng.choices(range(objects), cum_weights=weights, k=reads)):
            site.now = turn * INTERVAL_S
            asked += site.read(number, rng.randrange(count)) and turn >= reads // WARM_UP
        done += 1
        report(done / (2 * len(percents)))
        return round(100 * asked / (reads - reads // WARM_UP), 2)

    return [Row(percent, share(percent, False), share(percent, True)) for percent in percents]


@click.command("site-cache")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--nodes", type=click.IntRange(K + M), default=5, show_default=True)
@click.option("--objects", type=click.IntRange(100), default=3000, show_default=True)
@click.option("--reads", type=click.IntRange(100), default=30_000, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def site_cache(seed: int, nodes: int, objects: int, reads: int, as_json: bool) -> None:
    """Compare what a site with full caches reads from the registry, with and without probation."""
    percents = (1.0, 5.0, 15.0, 30.0)
    rows = with_progress(
        "site-cache", lambda report: run(seed, nodes, objects, reads=reads, percents=percents, report=report)
    )
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    for row in rows:
        click.echo(
            f"cache of {row.size_percent:g} %: one LRU-K {row.one_lru_k:.2f} %, segmented {row.segmented:.2f} % asked"
        )
