"""How each fault of a schedule is brought about, and ended, on a running site."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import trio

from tests.chaos.schedule import Fault
from tests.support.lab import Lab
from tests.support.loss import losing
from tests.support.proxy import CountingProxy
from tests.support.site import P2PD, Node

LOSS = 0.05
SLOW_BITS = 5e6
SLOW_UPLINK_BITS = 10e6
BLOCK = 4096
READY_S = 60.0
"""A start on a machine that the other daemons and the clients keep busy."""
LIAR = [sys.executable, "-m", "tests.support.liar"]


@dataclass(frozen=True, slots=True)
class Site:
    """What faults strike. `down` are the nodes whose process is not expected to run."""

    lab: Lab
    proxy: CountingProxy
    nodes: list[Node]
    down: set[int]

    @asynccontextmanager
    async def struck_by(self, fault: Fault) -> AsyncIterator[None]:
        """While the context lasts."""
        strike: Callable[[Fault], contextlib.AbstractAsyncContextManager[None]] = {
            "kill": self._gone, "stop": self._gone, "torn": self._gone, "liar": self._lying, "all cold": self._cold,
            "pause": self._paused, "full disk": self._full, "partition": self._parted,
        }.get(fault.kind, self._network)  # fmt: skip
        async with strike(fault):
            yield

    async def _restart(self, *indices: int) -> None:
        for index in indices:
            self.nodes[index].launch()
        for index in indices:
            await trio.to_thread.run_sync(self.nodes[index].wait_ready, READY_S)
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
        """Everything is off at once, and nothing of the caches is left."""
        await self._end(fault)
        for index in fault.nodes:
            forget(self.nodes[index].data)
        await self._restart(*fault.nodes)
        yield

    @asynccontextmanager
    async def _lying(self, fault: Fault) -> AsyncIterator[None]:
        """The same node, with the same key, but every shard that it gives has a wrong bit."""
        await self._end(fault)
        (index,) = fault.nodes
        self.nodes[index].program = LIAR
        await self._restart(index)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._end(fault)
                self.nodes[index].program = P2PD
                await self._restart(index)

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
        assert ballast.parent.is_mount(), "only a disk of the test's own is filled"
        free = shutil.disk_usage(ballast.parent).free
        with ballast.open("wb") as file:
            for size in (free, free * 9 // 10, free // 2):  # the daemon takes of it meanwhile
                with contextlib.suppress(OSError):
                    os.posix_fallocate(file.fileno(), 0, size)
                    break
        try:
            yield
        finally:
            ballast.unlink()

    @asynccontextmanager
    async def _parted(self, fault: Fault) -> AsyncIterator[None]:
        """Neither side reaches the other; both reach the registry."""
        here, there = set(fault.nodes), set(range(len(self.nodes))) - set(fault.nodes)
        walls = [(a, b) for one, other in ((here, there), (there, here)) for a in one for b in other]

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
        """What blocks for a moment: other programs, and the proxy's thread."""
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


def forget(data: Path) -> None:
    """All but who the node is."""
    for path in data.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix in (".sqlite", ".msgpack", ".json") or path.name.endswith(("-wal", "-shm")):
            path.unlink()


def tear(data: Path, rng: Random) -> None:
    """What a power cut leaves of files that were not synced: cut off, or blocks of zeros in them."""
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
