"""The faults of a schedule. Each is a context that begins the fault on a running site, and ends it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from random import Random

import trio

from tests.chaos.schedule import Fault
from tests.support.lab import Lab
from tests.support.loss import losing
from tests.support.lying_daemon import tell_lies
from tests.support.processes import wait_for
from tests.support.proxy import CountingProxy
from tests.support.site import P2PD, Node

LOSS = 0.05
SLOW_BITS = 5e6
SLOW_UPLINK_BITS = 10e6
BLOCK = 4096
BACK_S = 30.0
"""Longest wait for nodes of earlier faults: on a busy machine their restart outlasts the fault."""
LIAR = [sys.executable, "-m", "tests.support.lying_daemon"]
LIE_S = 2.0
"""Time for which a liar tells the same lies."""
LIES: tuple[dict[str, str], ...] = (
    {"GetShards": "wrong bytes"},
    {"Resolve": "own image"},
    {"*": "not-found"},
    {"GetShards": "by ghosts", "GetHoldings": "holds all", "FindHolders": "holds all"},
    {"*": "denied", "Resolve": "wrong size"},
    {"*": "bomb"},
    {"GetShards": "fabricated", "Resolve": "own image"},
)
"""What a liar answers to requests, one after the other. The last ones have it shut out by the whole site."""


@dataclass(frozen=True, slots=True)
class Site:
    """The site that faults strike. `down`: nodes whose processes are stopped on purpose. `images`: by tag, the
    registry's digest, size and media type."""

    lab: Lab
    proxy: CountingProxy
    nodes: list[Node]
    down: set[int]
    images: Mapping[str, tuple[str, int, str]]

    @asynccontextmanager
    async def struck_by(self, fault: Fault) -> AsyncIterator[None]:
        """Apply the fault to the site while the context lasts."""
        strikes: dict[str, Callable[[Fault], contextlib.AbstractAsyncContextManager[None]]]
        strikes = dict.fromkeys(("kill", "stop", "torn"), self._gone)
        strikes |= {"liar": self._lying, "all cold": self._cold, "pause": self._paused}
        strikes |= {"full disk": self._full, "partition": self._parted}
        async with strikes.get(fault.kind, self._network)(fault):
            yield

    async def _restart(self, *indices: int) -> None:
        for index in indices:
            self.nodes[index].launch()
        for index in indices:
            await trio.to_thread.run_sync(self.nodes[index].wait_ready)
            self.down.discard(index)

    async def _end(self, fault: Fault) -> None:
        self.down.update(fault.nodes)
        for index in fault.nodes:
            node = self.nodes[index]
            if fault.kind in ("stop", "liar"):
                status = await trio.to_thread.run_sync(node.stop)
                if status:
                    raise AssertionError(f"{node.name} ended with {status} when it was asked to stop")
            else:
                node.kill()

    @asynccontextmanager
    async def _gone(self, fault: Fault) -> AsyncIterator[None]:
        await self._end(fault)
        if fault.kind == "torn":
            tear(self.nodes[fault.nodes[0]].data, Random(fault.seed))
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._restart(*fault.nodes)

    @asynccontextmanager
    async def _cold(self, fault: Fault) -> AsyncIterator[None]:
        """Stop all nodes, and start them again with empty caches, once all nodes of earlier faults are back."""
        back = partial(wait_for, "the nodes of earlier faults are back", lambda: not self.down, seconds=BACK_S)
        await trio.to_thread.run_sync(back)
        await self._end(fault)
        for index in fault.nodes:
            self.nodes[index].forget()
        await self._restart(*fault.nodes)
        yield

    @asynccontextmanager
    async def _lying(self, fault: Fault) -> AsyncIterator[None]:
        """Restart the node with its key as a liar, which changes its lies every LIE_S."""
        await self._end(fault)
        (index,) = fault.nodes
        self.nodes[index].program = LIAR
        await self._restart(index)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._lie, self.nodes[index].folder, Random(fault.seed))
                yield
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                self.down.add(index)
                self.nodes[index].kill()  # a stop takes up to 10 s while its own clients read, and the next fault comes
                self.nodes[index].program = P2PD
                await self._restart(index)

    async def _lie(self, folder: Path, rng: Random) -> None:
        """In the order of LIES, from one of the first: the last ones have the liar shut out."""
        for number in count(rng.randrange(len(LIES) // 2)):
            tell_lies(folder, lies=LIES[number % len(LIES)], image=rng.choice([*self.images.values()]))
            await trio.sleep(LIE_S)

    @asynccontextmanager
    async def _paused(self, fault: Fault) -> AsyncIterator[None]:
        self.nodes[fault.nodes[0]].pause()
        try:
            yield
        finally:
            self.nodes[fault.nodes[0]].resume()

    @asynccontextmanager
    async def _full(self, fault: Fault) -> AsyncIterator[None]:
        ballast = self.nodes[fault.nodes[0]].data / "ballast"
        assert ballast.parent.is_mount(), "fills only a disk that this run mounted"
        free = shutil.disk_usage(ballast.parent).free
        with ballast.open("wb") as file:
            for size in (free, free * 9 // 10, free // 2):  # the daemon may use some of the free space meanwhile
                with contextlib.suppress(OSError):
                    os.posix_fallocate(file.fileno(), 0, size)
                    break
        try:
            yield
        finally:
            ballast.unlink()

    @asynccontextmanager
    async def _parted(self, fault: Fault) -> AsyncIterator[None]:
        """Separate the two sides from each other. Both reach the registry."""
        here, there = set(fault.nodes), set(range(len(self.nodes))) - set(fault.nodes)
        walls = [(a, b) for a in here for b in there] + [(b, a) for a in here for b in there]

        def route(verb: str) -> None:
            for a, b in walls:
                command = ["ip", "-n", self.lab.nodes[a].name, "route", verb, "blackhole", f"{self.lab.address(b)}/32"]
                subprocess.run(command, check=True, capture_output=True)

        await trio.to_thread.run_sync(route, "add")
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(route, "delete")

    @asynccontextmanager
    async def _network(self, fault: Fault) -> AsyncIterator[None]:
        broken = self._broken(fault)
        await trio.to_thread.run_sync(broken.__enter__)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(broken.__exit__, None, None, None)

    @contextlib.contextmanager
    def _broken(self, fault: Fault) -> Iterator[None]:
        """A fault of the network. Its begin and its end block this thread for a moment."""
        lab, proxy, rates = self.lab, self.proxy, self.lab.rates
        with contextlib.ExitStack() as stack:
            match fault.kind:
                case "lossy link":
                    stack.enter_context(losing(lab.nodes[fault.nodes[0]], LOSS))
                    stack.enter_context(losing(lab.switch, LOSS, f"node{fault.nodes[0]}"))
                case "slow link":
                    stack.callback(lab.set_node_rate, fault.nodes[0], rates.node)
                    lab.set_node_rate(fault.nodes[0], SLOW_BITS)
                case "uplink dead":
                    stack.enter_context(losing(lab.wan, 1.0))
                case "uplink slow":
                    stack.callback(lab.set_uplink, rates.uplink)
                    lab.set_uplink(SLOW_UPLINK_BITS)
                case "uplink cut":
                    stack.callback(proxy.restore)
                    proxy.cut()
                case "uplink stalled":
                    stack.callback(proxy.restore)
                    proxy.stall()
                case "registry 429" | "registry 500":
                    stack.callback(proxy.restore)
                    proxy.answer(int(fault.kind.split()[1]))
                case _:
                    raise AssertionError(f"no such fault: {fault.kind}")
            yield


def tear(data: Path, rng: Random) -> None:
    """Damage files as a power cut damages unsynced ones: cut them off, or write blocks of zeros into them."""
    for path in sorted(data.rglob("*")):
        if not path.is_file() or path.suffix in (".key", ".pem", ".lock") or rng.random() < 0.5:
            continue
        size = path.stat().st_size
        if rng.random() < 0.3:
            os.truncate(path, rng.randint(0, size))
            continue
        with path.open("r+b") as file:
            for _ in range(rng.randint(1, 4)):
                file.seek(rng.randrange(0, max(1, size // BLOCK)) * BLOCK)
                file.write(b"\0" * min(BLOCK, max(0, size - file.tell())))
