"""A crowd with one admitted member that lies: about shards, or about blocks that it read from the registry."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import trio
from rich.table import Table

from node.exchange.contract import Sender
from node.oci.references import Locator
from node.registry.upstreams import Upstreams
from protocol.errors import ShoalError
from protocol.ids import Buffer, ObjectRef, PeerId, Shard
from protocol.messages import GetShards, ShardFound
from protocol.shard_proofs import make_proof
from simulations.cluster import Node
from simulations.registry import Image
from simulations.run import Report, play
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
"""Number of the node that lies."""
ATTEMPTS = 10
"""Attempts at a pull, one after another: clients of a registry try again."""
WAIT_S = 300.0
"""Time after the last pull in which evidence can reach the nodes that received nothing from the liar."""


@dataclass(frozen=True, slots=True)
class Liar(Setting):
    nodes: int = 30


@dataclass(frozen=True, slots=True)
class Crowd:
    """`quarantined`: seconds from the first lie to the quarantine, for each honest node that quarantined the liar."""

    seconds: tuple[float, ...]
    """Duration of each honest node's pull, including failed attempts; infinite if all failed."""
    failed: int
    """Attempts that failed."""
    copies: float
    lies: int
    quarantined: tuple[float, ...]
    wronged: int
    """Honest nodes that another honest node has in quarantine."""


@dataclass(frozen=True, slots=True)
class Result:
    crowds: dict[str, Crowd]
    """The crowd for each behaviour of node LIAR."""


class _LyingNode(Node):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lies: list[float] = []
        """Times of its lies."""

    def lie(self, data: Buffer) -> bytearray:
        self.lies.append(trio.current_time())
        wrong = bytearray(data)
        wrong[len(wrong) // 2] ^= 1
        return wrong


class _OfShards(_LyingNode):
    """Flips one bit of each shard that it sends to others, and signs that for keepers, which so pass the lie on."""

    async def serve(self, peer: PeerId, request: GetShards, sender: Sender) -> None:
        await super().serve(peer, request, _LyingSender(self, sender))

    def altered(self, message: ShardFound, body: Buffer) -> tuple[ShardFound, Buffer]:
        wrong, proof = self.lie(body), message.proof
        if proof is not None:
            shard, signer = Shard(message.k, message.m, message.index), self._identity
            proof = make_proof(message.record, shard, wrong, maker=signer.peer_id, sign=signer.sign)
        return msgspec.structs.replace(message, proof=proof), wrong


@dataclass(frozen=True, slots=True)
class _LyingSender:
    node: _OfShards
    sender: Sender

    def send(self, message: ShardFound, body: Buffer) -> None:
        self.sender.send(*self.node.altered(message, body))

    async def room(self) -> None:
        await self.sender.room()

    def coming(self) -> None:
        self.sender.coming()

    def end(self, error: ShoalError) -> None:
        self.sender.end(error)


class _OfRecords(_LyingNode):
    """Flips one bit of each block of a layer that it reads from the registry, and signs the result."""

    def upstreams(self, kind: type[Upstreams] = Upstreams) -> Upstreams:
        misread = super().upstreams(_Misread)
        assert isinstance(misread, _Misread)
        misread.lie = self.lie
        return misread


class _Misread(Upstreams):
    """Alters each block of a layer, except in reads that compare a block with the registry's."""

    lie: Callable[[Buffer], bytearray]

    async def blocks(
        self,
        locator: Locator,
        ref: ObjectRef,
        first: int,
        count: int,
        *,
        certain: bool = False,
        background: bool = False,
        coming: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[bytearray, None]:
        right = super().blocks(locator, ref, first, count, certain=certain, background=background, coming=coming)
        async with aclosing(right) as blocks:
            async for data in blocks:
                yield data if certain or ref.block_count == 1 else self.lie(data)


HONEST, SHARDS, RECORDS = "honest", "wrong shards", "false records"
KINDS: dict[str, type[_LyingNode]] = {HONEST: _LyingNode, SHARDS: _OfShards, RECORDS: _OfRecords}


class _Watched:
    """Pulls and quarantines of a crowd's honest nodes."""

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


def crowd_of(setup: Liar, kind: str, report: Report) -> Crowd:
    async def main() -> Crowd:
        registry = setup.registry()
        image = setup.push(registry)
        cluster = setup.cluster(
            registry, of_bytes(image.size * (setup.nodes - 1), lambda share: report(min(1.0, share)))
        )
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
            tuple(crowd.seconds),
            crowd.failed,
            copies=registry.bytes_by_site[SITE] / image.size,
            lies=len(liar.lies),
            quarantined=tuple(at - liar.lies[0] for at in crowd.quarantined_at),
            wronged=len(accused - {liar.peer}),
        )

    return play(setup.seed, main)


def run(setup: Liar, report: Report) -> Result:
    crowds = {
        kind: crowd_of(setup, kind, lambda share, before=before: report((before + share) / len(KINDS)))  # type: ignore[misc]
        for before, kind in enumerate(KINDS)
    }
    return Result(crowds)


def table_of(setup: Liar, result: Result) -> Table:
    table = Table("", *result.crowds, title=f"{setup.nodes} nodes, of which one lies, {setup.image / 1e6:g} MB")
    crowds = result.crowds.values()
    for name, share in (("median", 0.5), ("last", 1.0)):
        table.add_row(f"{name} completion", *(f"{after(crowd.seconds, share):.1f} s" for crowd in crowds))
    table.add_row("attempts that failed", *(f"{crowd.failed} in {len(crowd.seconds)} pulls" for crowd in crowds))
    table.add_row("copies asked of the registry", *(f"{crowd.copies:.3f}" for crowd in crowds))
    table.add_row("lies", *(f"{crowd.lies}" for crowd in crowds))
    table.add_row("nodes that have the liar in quarantine", *(f"{len(crowd.quarantined)}" for crowd in crowds))
    for name, share in (("half of these", 0.5), ("all", 1.0)):
        times = (f"{after(crowd.quarantined, share):.1f} s" if crowd.quarantined else "" for crowd in crowds)
        table.add_row(f"{name}, after the first lie", *times)
    table.add_row("honest nodes in quarantine", *(f"{crowd.wronged}" for crowd in crowds))
    return table


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    for name, crowd in result.crowds.items():
        shares = [number / len(crowd.seconds) for number in range(1, len(crowd.seconds) + 1)]
        left.plot(sorted(crowd.seconds), shares, label=name)
        right.plot(sorted(crowd.quarantined), shares[: len(crowd.quarantined)], label=name)
    left.set(xlabel="seconds of a pull", ylabel="nodes that are done", xlim=(0, None), ylim=(0, 1))
    right.set(xlabel="seconds from the first lie", ylabel="nodes that have the liar in quarantine", ylim=(0, 1))
    left.legend()


@scenario("liar", nodes=30)
@setting_options
def liar(output: Output, **given: Any) -> None:
    """All nodes except a liar pull one image at the same moment. The liar sends wrong shards or signs false records."""
    output.show(Liar(**given), run, table_of, draw)
