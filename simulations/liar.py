"""A crowd with one admitted member that lies: about shards, or about what it read from the registry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio
from rich.table import Table

from node.exchange import Answer
from node.locator import Locator
from node.origin import Origin
from node.upstream import Upstreams
from protocol.ids import Buffer, ObjectRef, PeerId
from protocol.messages import Request, ShardFound
from simulations.cluster import Node
from simulations.registry import Image
from simulations.run import Told, play
from simulations.scenario import (
    SITE,
    Output,
    Setting,
    after,
    of_bytes,
    pull_once,
    running,
    scenario,
    setting_options,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIAR = 1
"""Its number."""
ATTEMPTS = 10
"""For a pull, one after the other: clients of a registry try again."""
WAIT_S = 300.0
"""After the last pull, for word of the liar to come to those whom it told nothing."""


@dataclass(frozen=True, slots=True)
class Liar(Setting):
    nodes: int = 30


@dataclass(frozen=True, slots=True)
class Crowd:
    """`quarantined`: seconds from the first lie until an honest node had the liar in quarantine, of each that had."""

    seconds: tuple[float, ...]
    """Of each honest node's pull, attempts that failed included; infinite where all of them did."""
    failed: int
    """Attempts."""
    copies: float
    lies: int
    quarantined: tuple[float, ...]
    wronged: int
    """Honest nodes that another honest one has in quarantine."""


@dataclass(frozen=True, slots=True)
class Result:
    crowds: dict[str, Crowd]
    """By what the one member does."""


class _LyingNode(Node):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lies: list[float] = []
        """When it told them."""

    def lie(self, data: Buffer) -> bytearray:
        self.lies.append(trio.current_time())
        wrong = bytearray(data)
        wrong[len(wrong) // 2] ^= 1
        return wrong


class _OfShards(_LyingNode):
    """One bit is wrong of each shard that it gives to others."""

    async def _handle(self, peer: PeerId, request: Request) -> Answer:
        answer = await super()._handle(peer, request)
        if not isinstance(answer.message, ShardFound) or answer.body is None:
            return answer
        return Answer(answer.message, self.lie(answer.body))


class _OfRecords(_LyingNode):
    """One bit is wrong of each block of the layers that it reads from the registry, and it signs that."""

    def _origin(self, work: trio.Nursery) -> Origin:
        return _Misread(self.upstreams, work, self.lie)


class _Misread(Origin):
    def __init__(self, upstreams: Upstreams, work: trio.Nursery, lie: Callable[[Buffer], bytearray]) -> None:
        super().__init__(upstreams, work)
        self._lie = lie

    async def read(self, locator: Locator, ref: ObjectRef, index: int, **how: Any) -> bytearray:
        data = await super().read(locator, ref, index, **how)
        return self._lie(data) if ref.block_count > 1 else data


HONEST, SHARDS, RECORDS = "honest", "wrong shards", "false records"
KINDS: dict[str, type[_LyingNode]] = {HONEST: _LyingNode, SHARDS: _OfShards, RECORDS: _OfRecords}


class _Watched:
    """The honest nodes of a crowd, and what they go through."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.quarantined_at: list[float] = []
        self.failed = 0

    async def pull(self, node: Node, image: Image) -> None:
        began = trio.current_time()
        for _ in range(ATTEMPTS):
            if not (await pull_once(node, image)).error:
                self.seconds.append(trio.current_time() - began)
                return
            self.failed += 1
        self.seconds.append(math.inf)

    async def watch(self, node: Node, liar: PeerId) -> None:
        while not node.membership.is_quarantined(liar):
            await node.membership.wait_changed()
        self.quarantined_at.append(trio.current_time())


def crowd_of(what: Liar, kind: str, told: Told) -> Crowd:
    async def main() -> Crowd:
        registry = what.registry()
        image = what.push(registry)
        cluster = what.cluster(registry, of_bytes(image.size * (what.nodes - 1), lambda share: told(min(1.0, share))))
        cluster.kinds[LIAR] = KINDS[kind]
        crowd = _Watched()
        async with running(cluster):
            liar = cluster.nodes[LIAR]
            assert isinstance(liar, _LyingNode)
            honest = [node for node in cluster.nodes if node is not liar]
            async with trio.open_nursery() as watching:
                for node in honest:
                    watching.start_soon(crowd.watch, node, liar.peer)
                async with trio.open_nursery() as pulling:
                    for node in honest:
                        pulling.start_soon(crowd.pull, node, image)
                watching.cancel_scope.deadline = trio.current_time() + (WAIT_S if liar.lies else 0.0)
        accused = {peer for node in honest for peer, _, _ in node.membership.quarantines()}
        return Crowd(
            tuple(crowd.seconds), crowd.failed, registry.bytes_by_site[SITE] / image.size, len(liar.lies),
            tuple(at - liar.lies[0] for at in crowd.quarantined_at), len(accused - {liar.peer}),
        )  # fmt: skip

    return play(what.seed, main)


def run(what: Liar, told: Told) -> Result:
    crowds = {
        kind: crowd_of(what, kind, lambda share, before=before: told((before + share) / len(KINDS)))  # type: ignore[misc]
        for before, kind in enumerate(KINDS)
    }
    return Result(crowds)


def table_of(what: Liar, result: Result) -> Table:
    table = Table("", *result.crowds, title=f"{what.nodes} nodes, of which one lies, {what.image / 1e6:g} MB")
    crowds = result.crowds.values()
    for name, share in (("median", 0.5), ("last", 1.0)):
        table.add_row(f"{name} completion", *(f"{after(one.seconds, share):.1f} s" for one in crowds))
    table.add_row("attempts that failed", *(f"{one.failed} in {len(one.seconds)} pulls" for one in crowds))
    table.add_row("copies asked of the registry", *(f"{one.copies:.3f}" for one in crowds))
    table.add_row("lies told", *(f"{one.lies}" for one in crowds))
    table.add_row("nodes that have the liar in quarantine", *(f"{len(one.quarantined)}" for one in crowds))
    for name, share in (("half of these", 0.5), ("all", 1.0)):
        times = (f"{after(one.quarantined, share):.1f} s" if one.quarantined else "" for one in crowds)
        table.add_row(f"{name}, after the first lie", *times)
    table.add_row("honest nodes in somebody's quarantine", *(f"{one.wronged}" for one in crowds))
    return table


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    for name, one in result.crowds.items():
        shares = [number / len(one.seconds) for number in range(1, len(one.seconds) + 1)]
        left.plot(sorted(one.seconds), shares, label=name)
        right.plot(sorted(one.quarantined), shares[: len(one.quarantined)], label=name)
    left.set(xlabel="seconds of a pull", ylabel="nodes that are done", xlim=(0, None), ylim=(0, 1))
    right.set(xlabel="seconds from the first lie", ylabel="nodes that have the liar in quarantine", ylim=(0, 1))
    left.legend()


@scenario("liar", nodes=30)
@setting_options
def liar(output: Output, **given: Any) -> None:
    """All nodes but one pull one image at the same moment; that one gives wrong shards, or signs false records."""
    output.show(Liar(**given), run, table_of, draw)
