"""Reads of single blocks, joined into few requests to the upstream.

A worker that becomes free takes a block for the address of clients that has the fewest runs in transit. Of equals it
takes the address, and of that the connection, whose last run is longest ago, and of its blocks the one that has waited
longest, together with those that follow it in the object.
Like small packets in Nagle's algorithm, blocks that follow a run in transit wait until it ends or MAX_RUN of them wait:
a client that reads in order asks for the next block as each arrives, which would cost one request per block.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import trio

from node.oci.references import Locator
from node.runtime.fair_places import Client, Demand, current_demand, working_for
from protocol.errors import CorruptObjectError, ShoalError, UnavailableError
from protocol.ids import BlockId, ObjectRef

log = logging.getLogger(__name__)

MAX_RUN = 16
"""Most blocks in one request: enough to spread its cost, and few enough that other objects soon get their turn."""


class BlockRanges(Protocol):
    """The part of `Upstreams` (node/registry/upstreams.py) that batching uses."""

    def blocks(
        self, locator: Locator, ref: ObjectRef, first: int, count: int, *, certain: bool, background: bool
    ) -> AsyncGenerator[bytearray, None]: ...

    def connections(self, upstream: str) -> int: ...


@dataclass(eq=False, slots=True)
class _Read:
    locator: Locator
    ref: ObjectRef
    index: int
    demand: Demand = field(default_factory=current_demand)
    done: trio.Event = field(default_factory=trio.Event)
    data: bytearray | None = None
    error: ShoalError | None = None


@dataclass(eq=False, slots=True)
class _Queue:
    """Reads from one upstream: either all that clients wait for, or all in the background."""

    background: bool
    waiting: OrderedDict[BlockId, _Read] = field(default_factory=OrderedDict)
    following: set[BlockId] = field(default_factory=set)
    """For each run in transit, the block that follows it."""
    workers: int = 0
    in_transit: Counter[str] = field(default_factory=Counter)
    """Runs by the address of the client for whom each was begun."""
    _runs: int = 0
    _last: dict[str | Client, int] = field(default_factory=dict)
    """By address and by client that waits: the number of the last run that was begun for it."""

    def take_run(self) -> list[_Read]:
        """Empty if all reads have to wait: the worker that reads the run before them takes them afterwards."""
        waiting = {client for read in self.waiting.values() for client in read.demand.clients}
        keys = waiting | {client.address for client in waiting}
        self._last = {key: number for key, number in self._last.items() if key in keys}
        ranks = {client: self._rank(client) for client in waiting}
        due = {block: min(ranks[client] for client in read.demand.clients) for block, read in self.waiting.items()}
        for block in sorted(due, key=due.__getitem__):
            run = [block] if _beside(block, -1) not in self.waiting else []
            while run and len(run) < MAX_RUN and self._joins(following := _beside(run[-1], 1), run[0]):
                run.append(following)
            if len(run) == MAX_RUN or (run and block not in self.following):
                return [self.waiting.pop(member) for member in run]
        return []

    @contextmanager
    def running(self, run: list[_Read]) -> Iterator[None]:
        """While the context is open, the run counts for the client of its first read that is due first."""
        following, client = _beside(run[-1].ref.block(run[-1].index), 1), self._first(run[0])
        self._runs += 1
        self._last[client.address] = self._last[client] = self._runs
        self.following.add(following)
        self.in_transit[client.address] += 1
        try:
            yield
        finally:
            self.following.discard(following)
            self.in_transit[client.address] -= 1
            self.in_transit += Counter()  # forget addresses without a run

    def _first(self, read: _Read) -> Client:
        return min(read.demand.clients, key=self._rank)

    def _rank(self, client: Client) -> tuple[int, int, int]:
        return self.in_transit[client.address], self._last.get(client.address, 0), self._last.get(client, 0)

    def _joins(self, block: BlockId, first: BlockId) -> bool:
        """Whether `block` waits and may share a request with `first`: a grant must not serve another client."""
        return block in self.waiting and self.waiting[block].locator.grant == self.waiting[first].locator.grant


class BatchedReads:
    """A second `read` of a block waits for the first, then reads it again. node/blocks/home.py shares one result."""

    def __init__(
        self, upstreams: BlockRanges, nursery: trio.Nursery, *, sharing: Callable[[], int] = lambda: 1
    ) -> None:
        """`sharing` returns the number of nodes of the site: they share the uplink and the connections over it."""
        self._upstreams, self._nursery, self._sharing = upstreams, nursery, sharing
        self._queues: dict[tuple[str, bool], _Queue] = {}

    async def read(self, locator: Locator, ref: ObjectRef, index: int, *, background: bool = False) -> bytearray:
        """Block `index` as the upstream sends it. Raises NotFoundError, DeniedError or UnavailableError.

        `background` is for blocks that no client waits for: they are read on one connection, and only while nothing
        else is read from the upstream. Such a read may wait forever; foreground reads of the block do not wait for it.
        """
        # Raises for an unknown upstream before anything is queued.
        connections = self._upstreams.connections(locator.upstream)
        limit = 1 if background else max(1, round(connections / self._sharing()))
        read = _Read(locator, ref, index)
        queue = self._queues.setdefault((locator.upstream, background), _Queue(background))
        block = ref.block(index)
        while (before := queue.waiting.get(block)) is not None:
            await before.done.wait()
        queue.waiting[block] = read
        if queue.workers < limit:
            queue.workers += 1
            self._nursery.start_soon(self._work, queue)
        try:
            await read.done.wait()
        finally:
            if queue.waiting.get(block) is read:
                del queue.waiting[block]
            read.done.set()  # also if this read was cancelled: another may wait for its place
        if read.data is None:
            raise read.error or UnavailableError(f"{ref.digest} was not read")
        return read.data

    async def read_certain(self, locator: Locator, ref: ObjectRef, index: int) -> bytearray:
        """Like `read`, but from the registry itself and never from a mirror."""
        async with aclosing(self._upstreams.blocks(locator, ref, index, 1, certain=True, background=False)) as blocks:
            return await anext(blocks)

    async def read_verified(self, locator: Locator, ref: ObjectRef, index: int) -> bytearray:
        """Like `read_certain`, but from the whole object, whose digest then shows that these are its bytes. It is read
        in the background. Raises CorruptObjectError if the registry has sent other bytes than those of the digest."""
        hasher, block = hashlib.new(ref.digest.algorithm), bytearray()
        whole = self._upstreams.blocks(locator, ref, 0, ref.block_count, certain=True, background=True)
        async with aclosing(whole) as blocks:
            number = 0
            async for data in blocks:
                hasher.update(data)
                block = data if number == index else block
                number += 1
        if hasher.hexdigest() != ref.digest.hex:
            raise CorruptObjectError(f"{locator.upstream} sends other bytes than those of {ref.digest}")
        return block

    async def _work(self, queue: _Queue) -> None:
        try:
            # Let every task of this tick queue its read, so that neighbours share a request.
            await trio.lowlevel.checkpoint()
            while run := queue.take_run():
                with queue.running(run), working_for(run[0].demand):
                    await self._fetch(run, queue.background)
        finally:
            queue.workers -= 1

    async def _fetch(self, run: list[_Read], background: bool) -> None:
        first, locator, ref = run[0].index, run[0].locator, run[0].ref
        waiting = list(run)
        failure: ShoalError = UnavailableError(f"{locator.upstream} ended {ref.digest} early")
        try:
            blocks = self._upstreams.blocks(locator, ref, first, len(run), certain=False, background=background)
            async with aclosing(blocks):
                async for data in blocks:
                    if not waiting:
                        break
                    read = waiting.pop(0)
                    read.data = data
                    read.done.set()
        except ShoalError as error:
            failure = error
        except Exception as error:  # a bug in one transfer is logged, and must not end the daemon
            log.exception("reading %s failed", ref.digest)
            failure = UnavailableError(f"reading {ref.digest}: {type(error).__name__}")
        finally:
            for read in waiting:
                read.error = type(failure)(*failure.args)
                read.done.set()


def _beside(block: BlockId, step: int) -> BlockId:
    return BlockId(block.digest, block.index + step)
