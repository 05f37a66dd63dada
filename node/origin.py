"""Blocks from the registry, once each, in as few requests as can be.

Blocks that are wanted while every connection is busy are gathered, and a connection that falls free takes the one that
waits longest together with those that follow it in the same object.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

import trio

from node.locator import Locator
from protocol.errors import ShoalError, UnavailableError
from protocol.ids import BlockId, ObjectRef

log = logging.getLogger(__name__)

MAX_RUN = 8
"""Blocks in one request: the cost of a request is spread thin, and other objects need not wait long for their turn."""


class Registry(Protocol):
    """What is needed of node/upstream.py here."""

    def blocks(self, locator: Locator, ref: ObjectRef, first: int, count: int) -> AsyncGenerator[bytearray, None]: ...

    def connections(self, upstream: str) -> int: ...


class _Wanted:
    __slots__ = ("data", "done", "error", "locator", "ref")

    def __init__(self, locator: Locator, ref: ObjectRef) -> None:
        self.locator, self.ref = locator, ref
        self.done = trio.Event()
        self.data: bytearray | None = None
        self.error: ShoalError | None = None


class Origin:
    """A second `read` of a block waits for the first and reads again: sharing one result is node/seeder.py's work."""

    def __init__(self, registry: Registry, nursery: trio.Nursery, sharing: Callable[[], int] = lambda: 1) -> None:
        """`sharing` tells how many nodes the site has: they share the uplink, and what one may have open at a time."""
        self._registry, self._nursery, self._sharing = registry, nursery, sharing
        self._queues: dict[str, OrderedDict[BlockId, _Wanted]] = {}
        self._workers: dict[str, int] = {}

    async def read(self, locator: Locator, ref: ObjectRef, index: int) -> bytearray:
        """Block `index` as the registry gives it. Raises NotFoundError, DeniedError or UnavailableError."""
        # Raises for an unknown upstream before anything is queued.
        limit = max(1, round(self._registry.connections(locator.upstream) / self._sharing()))
        wanted = _Wanted(locator, ref)
        queue = self._queues.setdefault(locator.upstream, OrderedDict())
        block = ref.block(index)
        while (before := queue.get(block)) is not None:
            await before.done.wait()
        queue[block] = wanted
        if self._workers.get(locator.upstream, 0) < limit:
            self._workers[locator.upstream] = self._workers.get(locator.upstream, 0) + 1
            self._nursery.start_soon(self._work, locator.upstream)
        try:
            await wanted.done.wait()
        finally:
            if queue.get(block) is wanted:
                del queue[block]
            wanted.done.set()  # also where this read was cancelled: another may wait for its place
        if wanted.data is None:
            raise wanted.error or UnavailableError(f"{ref.digest} was not read")
        return wanted.data

    async def _work(self, upstream: str) -> None:
        queue = self._queues[upstream]
        try:
            # Let every task of this tick say what it wants, so that neighbours travel in one request.
            await trio.lowlevel.checkpoint()
            while queue:
                await self._fetch(self._next_run(queue))
        finally:
            self._workers[upstream] -= 1

    @staticmethod
    def _next_run(queue: OrderedDict[BlockId, _Wanted]) -> list[tuple[int, _Wanted]]:
        block, wanted = queue.popitem(last=False)
        run = [(block.index, wanted)]
        while len(run) < MAX_RUN:
            following = queue.pop(BlockId(block.digest, run[-1][0] + 1), None)
            if following is None:
                break
            run.append((run[-1][0] + 1, following))
        return run

    async def _fetch(self, run: list[tuple[int, _Wanted]]) -> None:
        first, (locator, ref) = run[0][0], (run[0][1].locator, run[0][1].ref)
        waiting = [wanted for _, wanted in run]
        failure: ShoalError = UnavailableError(f"{locator.upstream} ended {ref.digest} early")
        try:
            async with aclosing(self._registry.blocks(locator, ref, first, len(run))) as blocks:
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
