"""The choice between the site and the registry, with the figures that reads over real sockets give."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from random import Random

import pytest
import trio

from node.config.schema import UplinkPolicy, UpstreamPart
from node.registry.uplink import Uplink
from node.registry.upstreams import Upstreams
from protocol.errors import UnavailableError
from protocol.ids import BLOCK_SIZE
from protocol.ways import ALWAYS_SITE, LEAST_READS, Reason, Way
from tests.support.fake_registry import BLOB_REF, BLOBS, FakeRegistry, serve

SLOW = 1000.0
"""Bytes a second that the site gives."""


def run(check: Callable[[FakeRegistry, Upstreams, UpstreamPart], Awaitable[None]]) -> None:
    async def main() -> None:
        registry = FakeRegistry()
        async with trio.open_nursery() as nursery:
            url = await serve(nursery, registry.handle)
            part = UpstreamPart(name="fake", url=url, prefer="fastest")
            async with Upstreams([part], count=lambda name, count: None, rng=Random(1)) as upstreams:
                with trio.fail_after(60):
                    await check(registry, upstreams, part)
            nursery.cancel_scope.cancel()

    trio.run(main)


async def read(upstreams: Upstreams, times: int = 1) -> None:
    for _ in range(times):
        async with aclosing(upstreams.blocks(BLOBS, BLOB_REF, 0, 4)) as blocks:
            async for _block in blocks:
                pass


def feed_site(upstreams: Upstreams) -> None:
    now = trio.current_time()
    for _ in range(2 * LEAST_READS):
        reading = upstreams.ways("fake").site.begin(BLOCK_SIZE, now)
        reading.came(BLOCK_SIZE, now + BLOCK_SIZE / SLOW)
        reading.ended(now + BLOCK_SIZE / SLOW)


def test_reads_measure_the_registry_which_is_chosen_once_both_are_known() -> None:
    async def check(registry: FakeRegistry, upstreams: Upstreams, part: UpstreamPart) -> None:
        await read(upstreams, LEAST_READS - 1)
        feed_site(upstreams)
        assert upstreams.choose("fake", BLOCK_SIZE, 3).reason is Reason.UNKNOWN
        await read(upstreams)
        assert upstreams.ways("fake").registry.rate > SLOW
        assert upstreams.choose("fake", BLOCK_SIZE, 3).way is Way.REGISTRY
        assert upstreams.ways("fake").chosen.total() == 2

    run(check)


@pytest.mark.parametrize("fault", [429, 503])
def test_a_registry_that_pushes_back_once_is_left(fault: int) -> None:
    async def check(registry: FakeRegistry, upstreams: Upstreams, part: UpstreamPart) -> None:
        await read(upstreams, LEAST_READS)
        feed_site(upstreams)
        assert upstreams.choose("fake", BLOCK_SIZE, 3).way is Way.REGISTRY
        registry.faults = [fault]
        await read(upstreams)
        assert upstreams.choose("fake", BLOCK_SIZE, 3).reason is Reason.PUSHED_BACK

    run(check)


def test_a_reload_changes_the_preference_and_keeps_what_is_known() -> None:
    async def check(registry: FakeRegistry, upstreams: Upstreams, part: UpstreamPart) -> None:
        await read(upstreams, LEAST_READS)
        feed_site(upstreams)
        upstreams.prepared([UpstreamPart(name="fake", url=part.url)])()
        assert upstreams.choose("fake", BLOCK_SIZE, 3) == ALWAYS_SITE
        upstreams.prepared([part])()
        assert upstreams.choose("fake", BLOCK_SIZE, 3).way is Way.REGISTRY
        upstreams.prepared([UpstreamPart(name="fake", url=part.url, prefer="fastest", connections=3)])()
        assert upstreams.choose("fake", BLOCK_SIZE, 3).way is Way.REGISTRY, "with other connections"

    run(check)


def test_a_budget_of_the_uplink_leaves_no_choice() -> None:
    async def check(registry: FakeRegistry, upstreams: Upstreams, part: UpstreamPart) -> None:
        await read(upstreams, LEAST_READS)
        feed_site(upstreams)
        limited = UpstreamPart(name="fake", url=part.url, prefer="fastest", connections=3)
        upstreams.prepared([limited], [Uplink("fake", UplinkPolicy(daily=1 << 30))])()
        assert upstreams.choose("fake", BLOCK_SIZE, 3).reason is Reason.BUDGET

    run(check)


def test_a_registry_that_fails_is_left() -> None:
    async def check(registry: FakeRegistry, upstreams: Upstreams, part: UpstreamPart) -> None:
        await read(upstreams, LEAST_READS)
        feed_site(upstreams)
        registry.faults = [503] * 20
        with pytest.raises(UnavailableError):
            await read(upstreams)
        assert upstreams.choose("fake", BLOCK_SIZE, 3).reason is Reason.PUSHED_BACK

    run(check)
