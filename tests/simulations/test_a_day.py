"""A day of a site in virtual time: members leave and return, reads end, fail and are cancelled, and nothing leaks."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random

import trio
import trio.testing

from node.exchange.memory import MemoryNetwork
from protocol.errors import ShoalError
from protocol.ids import PeerId
from tests.support import names_in_memory as tags
from tests.support import site_in_memory as blocks

HOURS = 24
NODES = 5
EVERY_S = 180.0
"""Mean time between two events."""
QUIET_S = 300.0
"""Rest at the end of each hour: longer than any read may take."""
LEARNT = 9
"""Hours after which the tables that forget by age have their final size."""


class Day:
    """Some nodes that read blocks and some that resolve tags."""

    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        identities, members = blocks.site_of(NODES)
        self.nursery, self.rng = nursery, Random(11)
        self.registry, self.names = blocks.Registry(), tags.Registry()
        networks = MemoryNetwork(0.001), MemoryNetwork(0.005)
        self.readers = [
            blocks.Node(identity, members, networks[0], self.registry, nursery=nursery) for identity in identities
        ]
        self.askers = [
            tags.Node(folder, identity, members, networks[1], self.names, nursery=nursery) for identity in identities
        ]
        self.scopes: dict[tuple[type, PeerId], trio.CancelScope] = {}
        self.ended = self.failed = self.given_up = 0

    async def live(self, node: blocks.Node, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.CancelScope() as scope:
            self.scopes[type(node), node.own] = scope
            await node.exchange.run(task_status=task_status)

    async def leave_for_a_while(self, node: blocks.Node) -> None:
        self.scopes[type(node), node.own].cancel()
        await trio.sleep(self.rng.uniform(1, 60))
        await self.nursery.start(self.live, node)

    @asynccontextmanager
    async def registry_away(self) -> AsyncIterator[None]:
        self.registry.down, self.names.cut = True, {node.own for node in self.askers}
        yield
        self.registry.down, self.names.cut = False, set()

    async def read(self) -> None:
        """Read an object or resolve a tag on a random node. Every third read is cancelled at a random moment."""
        node, asker = self.rng.choice(self.readers), self.rng.choice(self.askers)
        for index in range(blocks.REF.block_count):
            if self.rng.random() < 0.5:
                await self.rng.choice(self.readers).forget(index)
        limit_s = self.rng.uniform(0, 0.3) if self.rng.random() < 0.33 else 600.0
        with trio.move_on_after(limit_s) as scope:
            try:
                if self.rng.random() < 0.4:
                    await node.read_all()
                else:
                    await asker.names.resolve(tags.APP, self.rng.choice(("latest", "quick", "edge", "none")))
                self.ended += 1
            except ShoalError:
                self.failed += 1
        self.given_up += scope.cancelled_caught

    async def hour(self, until: float) -> None:
        async with trio.open_nursery() as nursery:
            while (at := trio.current_time() + self.rng.expovariate(1 / EVERY_S)) < until - QUIET_S:
                await trio.sleep_until(at)
                chance = self.rng.random()
                if chance < 0.15:
                    await self.leave_for_a_while(self.rng.choice([*self.readers, *self.askers]))
                elif chance < 0.25:
                    async with self.registry_away():
                        await self.read()
                else:
                    for _ in range(self.rng.randint(1, 3)):
                        nursery.start_soon(self.read)
            await trio.sleep_until(until)

    def left(self) -> tuple[int, int]:
        """The numbers of tasks and objects, after the notes of the test's own fakes were removed."""
        for node in self.readers:
            node.view.failures.clear()
        for asker in self.askers:
            asker.heard.clear()
            asker.ages.clear()
            asker.view.failures.clear()
        gc.collect()
        return trio.lowlevel.current_statistics().tasks_living, len(gc.get_objects())


def test_after_a_day_a_site_has_no_more_tasks_and_objects_than_after_its_first_hours(tmp_path: Path) -> None:
    rests: list[tuple[int, int]] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            day = Day(nursery, tmp_path)
            for node in [*day.readers, *day.askers]:
                await nursery.start(day.live, node)
            for hour in range(HOURS):
                await day.hour(3600.0 * (hour + 1))
                for index in range(blocks.REF.block_count):
                    for reader in day.readers:
                        with suppress(ShoalError):
                            await reader.read(index)  # then all nodes hold the same blocks
                await trio.sleep(60)
                rests.append(day.left())
            assert min(day.ended, day.failed, day.given_up) > 10, (day.ended, day.failed, day.given_up)
            nursery.cancel_scope.cancel()
        for asker in day.askers:
            asker.table.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    tasks, objects = zip(*rests, strict=True)
    assert max(tasks[1:]) == tasks[0], tasks
    assert max(objects[-3:]) <= max(objects[:LEARNT]) + 1000, objects
