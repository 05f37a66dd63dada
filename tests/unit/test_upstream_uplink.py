"""The registry client and the uplink's limits, over real sockets: reads, refusals, and background reads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from random import Random

import pytest
import trio

from node.config.schema import UplinkPolicy, UpstreamPart
from node.registry import uplink as uplink_module
from node.registry.uplink import Uplink
from node.registry.upstreams import Upstreams
from protocol.errors import UnavailableError
from protocol.ids import BLOCK_SIZE
from tests.support.fake_registry import BLOB_REF, BLOBS, MANIFEST, MANIFESTS, FakeRegistry, cut, serve

Check = Callable[[FakeRegistry, Upstreams, Uplink], Awaitable[None]]


def run(check: Check, policy: UplinkPolicy, connections: int = 2) -> int:
    """Run `check`. Returns the number of bytes counted as read."""
    counted = 0

    def count(name: str, size: int) -> None:
        nonlocal counted
        counted += size

    async def main() -> None:
        registry, link = FakeRegistry(), Uplink("fake", policy)
        async with trio.open_nursery() as nursery:
            part = UpstreamPart(name="fake", url=await serve(nursery, registry.handle), connections=connections)
            async with Upstreams([part], count=count, rng=Random(1), uplinks=[link]) as upstreams:
                with trio.fail_after(60):
                    await check(registry, upstreams, link)
            nursery.cancel_scope.cancel()

    trio.run(main)
    return counted


async def read(upstreams: Upstreams, received: list[bytes]) -> None:
    async with aclosing(upstreams.blocks(BLOBS, BLOB_REF, 0, 4)) as blocks:
        async for block in blocks:
            received.append(bytes(block))


def test_a_spent_daily_budget_stops_bodies_but_not_names() -> None:
    daily = 2 * BLOCK_SIZE + 1000

    async def check(registry: FakeRegistry, upstreams: Upstreams, link: Uplink) -> None:
        received: list[bytes] = []
        with pytest.raises(UnavailableError, match="the uplink budget of the day is spent"):
            await read(upstreams, received)
        assert received == cut(0, 2)
        assert link.use().used == daily
        asked = len(registry.requests)
        with pytest.raises(UnavailableError, match="spent"):
            await read(upstreams, received)
        assert len(registry.requests) == asked, "a body over the budget is not requested"
        assert (await upstreams.resolve(MANIFESTS, "latest", whole=True))[1] == MANIFEST
        assert upstreams.endpoints("fake")[0].problem == "", "the registry is well"

    assert run(check, UplinkPolicy(daily=daily)) == daily + len(MANIFEST)


def test_an_interrupted_background_body_continues_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uplink_module, "QUIET_S", 0.01)

    async def check(registry: FakeRegistry, upstreams: Upstreams, link: Uplink) -> None:
        received: list[bytes] = []
        begun, done = trio.Event(), trio.Event()

        async def background() -> None:
            async with aclosing(upstreams.blocks(BLOBS, BLOB_REF, 0, 4, background=True)) as blocks:
                async for block in blocks:
                    received.append(bytes(block))
                    begun.set()
                    await done.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(background)
            await begun.wait()
            with link.foreground():
                done.set()
                # The background body gives up the only connection. Otherwise this read would wait forever.
                await read(upstreams, other := [])
                assert (other, received) == (cut(0, 4), cut(0, 1))
        assert received == cut(0, 4)
        spans = [request.headers.get("range") for request in registry.requests]
        assert spans[:2] == [None, None]
        assert spans[2] == f"bytes={BLOCK_SIZE}-{BLOB_REF.size - 1}"

    run(check, UplinkPolicy())
