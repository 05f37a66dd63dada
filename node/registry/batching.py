"""Blocks from the registry, once each, in as few requests as can be.

A connection that falls free takes the block that waits longest, together with those that follow it in the same object.
As Nagle's algorithm does with bytes, few blocks that follow a run which is being read wait for its end or for more of
them: a client reads in order, wants the next block as each one comes, and would cost a request for each.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

import trio

from node.oci.references import Locator
from protocol.errors import ShoalError, UnavailableError
from protocol.ids import BlockId, ObjectRef

log = logging.getLogger(__name__)

MAX_RUN = 16
"""Blocks in one request: the cost of a request is spread thin, and other objects need not wait long for their turn."""


class Registry(Protocol):
    """What is needed of node/registry/upstreams.py here."""

    def blocks(
        self, locator: Locator, ref: ObjectRef, first: int, count: int, *, certain: bool = False,
        background: bool = False,
    ) -> AsyncGenerator[bytearray, None]: ...  # fmt: skip

    def connections(self, upstream: str) -> int: ...


class _Wanted:
    __slots__ = ("data", "done", "error", "index", "locator", "ref")

    def __init__(self, locator: Locator, ref: ObjectRef, index: int) -> None:
        self.locator, self.ref, self.index = locator, ref, index
        self.done = trio.Event()
        self.data: bytearray | None = None
        self.error: ShoalError | None = None


class _Queue:
    """What is wanted of one upstream, by somebody who waits or in the background."""

    __slots__ = ("background", "following", "wanted", "workers")

    def __init__(self, background: bool) -> None:
        self.background = background
        self.wanted: OrderedDict[BlockId, _Wanted] = OrderedDict()
        self.following: set[BlockId] = set()
        """The blocks behind the runs that are being read."""
        self.workers = 0

    def take_run(self) -> list[_Wanted]:
        """Empty where what waits has to wait: the worker that reads the run before it comes back for it."""
        for block in self.wanted:
            run = [block] if _beside(block, -1) not in self.wanted else []
            while run and len(run) < MAX_RUN and self._goes_with(following := _beside(run[-1], 1), run[0]):
                run.append(following)
            if len(run) == MAX_RUN or (run and block not in self.following):
                return [self.wanted.pop(each) for each in run]
        return []

    def _goes_with(self, block: BlockId, first: BlockId) -> bool:
        """Whether both are wanted, and one request may ask for them: nobody reads with another one's grant."""
        return block in self.wanted and self.wanted[block].locator.grant == self.wanted[first].locator.grant


class Origin:
    """A second `read` of a block waits for the first and reads again: node/blocks/home.py shares one result."""

    def __init__(self, registry: Registry, nursery: trio.Nursery, sharing: Callable[[], int] = lambda: 1) -> None:
        """`sharing` tells how many nodes the site has: they share the uplink, and what one may have open at a time."""
        self._registry, self._nursery, self._sharing = registry, nursery, sharing
        self._queues: dict[tuple[str, bool], _Queue] = {}

    async def read(self, locator: Locator, ref: ObjectRef, index: int, *, background: bool = False) -> bytearray:
        """Block `index` as the registry gives it. Raises NotFoundError, DeniedError or UnavailableError.

        `background` is for what nobody waits for: on one connection, and only while nothing else is read of the
        upstream. It may take for ever; a foreground read of the same block does not wait for it.
        """
        # Raises for an unknown upstream before anything is queued.
        connections = self._registry.connections(locator.upstream)
        limit = 1 if background else max(1, round(connections / self._sharing()))
        wanted = _Wanted(locator, ref, index)
        queue = self._queues.setdefault((locator.upstream, background), _Queue(background))
        block = ref.block(index)
        while (before := queue.wanted.get(block)) is not None:
            await before.done.wait()
        queue.wanted[block] = wanted
        if queue.workers < limit:
            queue.workers += 1
            self._nursery.start_soon(self._work, queue)
        try:
            await wanted.done.wait()
        finally:
            if queue.wanted.get(block) is wanted:
                del queue.wanted[block]
            wanted.done.set()  # also where this read was cancelled: another may wait for its place
        if wanted.data is None:
            raise wanted.error or UnavailableError(f"{ref.digest} was not read")
        return wanted.data

    async def read_certain(self, locator: Locator, ref: ObjectRef, index: int) -> bytearray:
        """As `read`, but from the registry itself, whatever its mirrors give."""
        async with aclosing(self._registry.blocks(locator, ref, index, 1, certain=True)) as blocks:
            return await anext(blocks)

    async def _work(self, queue: _Queue) -> None:
        try:
            # Let every task of this tick say what it wants, so that neighbours travel in one request.
            await trio.lowlevel.checkpoint()
            while run := queue.take_run():
                following = BlockId(run[0].ref.digest, run[-1].index + 1)
                queue.following.add(following)
                try:
                    await self._fetch(run, queue.background)
                finally:
                    queue.following.discard(following)
        finally:
            queue.workers -= 1

    async def _fetch(self, run: list[_Wanted], background: bool) -> None:
        first, locator, ref = run[0].index, run[0].locator, run[0].ref
        waiting = list(run)
        failure: ShoalError = UnavailableError(f"{locator.upstream} ended {ref.digest} early")
        try:
            async with aclosing(self._registry.blocks(locator, ref, first, len(run), background=background)) as blocks:
                async for data in blocks:
                    if not waiting:
                        break
                    wanted = waiting.pop(0)
                    wanted.data = data
                    wanted.done.set()
        except ShoalError as error:
            failure = error
        except Exception as error:  # a bug in one transfer is told, and must not end the daemon
            log.exception("reading %s failed", ref.digest)
            failure = UnavailableError(f"reading {ref.digest}: {type(error).__name__}")
        finally:
            for wanted in waiting:
                wanted.error = type(failure)(*failure.args)
                wanted.done.set()


def _beside(block: BlockId, step: int) -> BlockId:
    return BlockId(block.digest, block.index + step)
