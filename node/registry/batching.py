"""Reads of stretches, joined into few requests to the upstream.

A stretch is a few consecutive blocks of one object: those of a stripe (protocol/stripes.py) that a node lacks. A worker
that becomes free takes a stretch for the address of clients that has the fewest runs in transit. Of equals it takes the
address, and of that the connection, whose last run is longest ago, and of its stretches the one that has waited
longest, together with the waiting stretches that are next to it in the object.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import trio

from node.oci.references import Locator
from node.runtime.fair_places import Client, Demand, current_demand, working_for
from protocol.errors import CorruptObjectError, ShoalError, UnavailableError
from protocol.ids import ObjectRef

log = logging.getLogger(__name__)

MAX_RUN = 16
"""Most blocks in one request that joins stretches: enough to spread its cost, and few enough that other objects soon
get their turn."""

Came = Callable[[int, bytearray], None]
"""Called with the index of a block and its bytes."""
_Rank = tuple[int, int, int]
"""Of clients, the one with the lowest has the next run."""


class BlockRanges(Protocol):
    """The part of `Upstreams` (node/registry/upstreams.py) that batching uses."""

    def blocks(
        self,
        locator: Locator,
        ref: ObjectRef,
        first: int,
        count: int,
        *,
        certain: bool,
        background: bool,
        coming: Callable[[], None] = ...,
    ) -> AsyncGenerator[bytearray, None]: ...

    def connections(self, upstream: str) -> int: ...


@dataclass(eq=False, slots=True)
class _Stretch:
    locator: Locator
    ref: ObjectRef
    first: int
    count: int
    came: Came
    coming: Callable[[], None]
    demand: Demand = field(default_factory=current_demand)
    ended: trio.Event = field(default_factory=trio.Event)
    run: _Run | None = None
    """The run that reads this stretch; None while it waits."""
    error: ShoalError | None = None

    @property
    def stop(self) -> int:
        return self.first + self.count


class _Run:
    """Adjacent stretches, read by one request. It is given up once nobody waits for any of them."""

    def __init__(self, stretches: list[_Stretch]) -> None:
        self.locator, self.ref = stretches[0].locator, stretches[0].ref
        self.first, self.stop = stretches[0].first, stretches[-1].stop
        self.left = deque(stretches)
        """Those that are not complete, and not dropped, in order."""
        self.scope = trio.CancelScope()
        for stretch in stretches:
            stretch.run = self

    def drop(self, stretch: _Stretch) -> None:
        if stretch in self.left:
            self.left.remove(stretch)
            if not self.left:
                self.scope.cancel()

    def coming(self) -> None:
        for stretch in self.left:
            stretch.coming()

    def came(self, index: int, data: bytearray) -> None:
        stretch = self.left[0]
        if index < stretch.first:
            return  # of a stretch that was dropped
        stretch.came(index, data)
        if index + 1 == stretch.stop:
            self.left.popleft()
            stretch.ended.set()

    def failed(self, error: ShoalError) -> None:
        while self.left:
            stretch = self.left.popleft()
            stretch.error = type(error)(*error.args)
            stretch.ended.set()


@dataclass(eq=False, slots=True)
class _Queue:
    """Stretches of one upstream: either all that clients wait for, or all in the background."""

    background: bool
    waiting: dict[_Stretch, None] = field(default_factory=dict)
    """In the order in which they began to wait."""
    workers: int = 0
    in_transit: Counter[str] = field(default_factory=Counter)
    """Runs by the address of the client for whom each was begun."""
    _runs: int = 0
    _last: dict[str | Client, int] = field(default_factory=dict)
    """By address and by client that waits: the number of the last run that was begun for it."""

    def take_run(self) -> _Run:
        """The stretch that is due first, with waiting ones next to it. At least one must wait."""
        waiting = {client for stretch in self.waiting for client in stretch.demand.clients}
        keys = waiting | {client.address for client in waiting}
        self._last = {key: number for key, number in self._last.items() if key in keys}
        ranks = {client: self._rank(client) for client in waiting}
        due = {stretch: min(ranks[client] for client in stretch.demand.clients) for stretch in self.waiting}
        first = min(due, key=due.__getitem__)
        run = self._beside(first, due)
        for stretch in run:
            del self.waiting[stretch]
        return _Run(run)

    def _beside(self, first: _Stretch, due: Mapping[_Stretch, _Rank]) -> list[_Stretch]:
        """`first` and its neighbours, of MAX_RUN blocks together. A client's stretches may have been queued in any
        order, so those before `first` that are due as soon are read before it; those of others must not delay it."""
        by_start = {(stretch.locator, stretch.ref, stretch.first): stretch for stretch in due}
        by_stop = {
            (stretch.locator, stretch.ref, stretch.stop): stretch for stretch in due if due[stretch] == due[first]
        }
        run, count, place = deque([first]), first.count, (first.locator, first.ref)
        while (before := by_stop.get((*place, run[0].first))) and count + before.count <= MAX_RUN:
            run.appendleft(before)
            count += before.count
        while (after := by_start.get((*place, run[-1].stop))) and count + after.count <= MAX_RUN:
            run.append(after)
            count += after.count
        return list(run)

    @contextmanager
    def running(self, run: _Run) -> Iterator[None]:
        """While the context is open, the run counts for the client of its first stretch that is due first."""
        client = min(run.left[0].demand.clients, key=self._rank)
        self._runs += 1
        self._last[client.address] = self._last[client] = self._runs
        self.in_transit[client.address] += 1
        try:
            yield
        finally:
            self.in_transit[client.address] -= 1
            self.in_transit += Counter()  # forget addresses without a run

    def _rank(self, client: Client) -> _Rank:
        return self.in_transit[client.address], self._last.get(client.address, 0), self._last.get(client, 0)


class BatchedReads:
    """Two reads of the same block are two requests: node/blocks/home.py shares one result."""

    def __init__(
        self, upstreams: BlockRanges, nursery: trio.Nursery, *, sharing: Callable[[], int] = lambda: 1
    ) -> None:
        """`sharing` returns the number of nodes of the site: they share the uplink and the connections over it."""
        self._upstreams, self._nursery, self._sharing = upstreams, nursery, sharing
        self._queues: dict[tuple[str, bool], _Queue] = {}

    async def stretch(
        self,
        locator: Locator,
        ref: ObjectRef,
        first: int,
        count: int,
        came: Came,
        *,
        coming: Callable[[], None] = lambda: None,
        background: bool = False,
    ) -> None:
        """Read blocks [first, first + count) as the upstream sends them. Raises NotFoundError, DeniedError or
        UnavailableError, also after some blocks came. If the caller is cancelled, nothing more is read for it.

        `came` gets the blocks in order, each as it arrives. `coming` is called whenever bytes of the request arrive
        that reads them. Both are called between two task steps, and must not raise.
        `background` is for blocks that no client waits for: they are read on one connection, and only while nothing
        else is read from the upstream. Such a read may wait forever; foreground reads of the blocks do not wait for it.
        """
        # Raises for an unknown upstream before anything is queued.
        connections = self._upstreams.connections(locator.upstream)
        limit = 1 if background else max(1, round(connections / self._sharing()))
        queue = self._queues.setdefault((locator.upstream, background), _Queue(background))
        stretch = _Stretch(locator, ref, first, count, came=came, coming=coming)
        queue.waiting[stretch] = None
        if queue.workers < limit:
            queue.workers += 1
            self._nursery.start_soon(self._work, queue)
        try:
            await stretch.ended.wait()
        finally:
            queue.waiting.pop(stretch, None)
            if stretch.run is not None:
                stretch.run.drop(stretch)
        if stretch.error is not None:
            raise stretch.error

    async def read(self, locator: Locator, ref: ObjectRef, index: int, *, background: bool = False) -> bytearray:
        """Block `index` alone. Waits and raises as `stretch`."""
        blocks: list[bytearray] = []
        await self.stretch(locator, ref, index, 1, came=lambda _, data: blocks.append(data), background=background)
        return blocks[0]

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
            # Let every task of this tick queue its stretch, so that neighbours share a request.
            await trio.lowlevel.checkpoint()
            while queue.waiting:
                run = queue.take_run()
                with queue.running(run), working_for(run.left[0].demand):
                    await self._fetch(run, queue.background)
        finally:
            queue.workers -= 1

    async def _fetch(self, run: _Run, background: bool) -> None:
        locator, ref, count = run.locator, run.ref, run.stop - run.first
        failure: ShoalError = UnavailableError(f"{locator.upstream} ended {ref.digest} early")
        try:
            blocks = self._upstreams.blocks(
                locator, ref, run.first, count, certain=False, background=background, coming=run.coming
            )
            with run.scope:
                async with aclosing(blocks):
                    index = run.first
                    async for data in blocks:
                        run.came(index, data)
                        index += 1
                        if not run.left:
                            break
        except ShoalError as error:
            failure = error
        except Exception as error:  # a bug in one transfer is logged, and must not end the daemon
            log.exception("reading %s failed", ref.digest)
            failure = UnavailableError(f"reading {ref.digest}: {type(error).__name__}")
        finally:
            run.failed(failure)
