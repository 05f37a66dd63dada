"""The uplink's limits in virtual time: rate, daily budget, free hours, and foreground before background."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from node.config.quantities import OptionalSize, Window
from node.config.schema import UplinkPolicy, UpstreamPart, uplink_policy
from node.registry.uplink import BURST_S, PORTION_S, QUIET_S, SAVE_EVERY_S, MakeWayError, Taken, Uplink, UplinkFile
from protocol.errors import UnavailableError

NOON = datetime.fromisoformat("2026-03-04T12:00")
RATE = 1 << 20
NIGHT = Window("22:00-06:00")


def clock() -> datetime:
    return NOON + timedelta(seconds=trio.current_time())


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    trio.run(scenario, clock=trio.testing.MockClock(autojump_threshold=0))


def uplink(policy: UplinkPolicy, share: int = 1) -> Uplink:
    return Uplink("fake", policy, sharing=lambda: share, clock=clock)


async def read(link: Uplink, size: int, *, background: bool = False, chunk: int = 512 << 10) -> list[tuple[float, int]]:
    """Read as a body is read. Returns time and size of each portion."""
    came = []
    while size:
        taken = await link.take(min(chunk, size), background=background)
        link.came(taken, taken.count)
        came.append((trio.current_time(), taken.count))
        size -= taken.count
    return came


@pytest.mark.parametrize("share", [1, 4])
def test_the_rate_is_kept_exactly_over_any_time_by_all_readers_together(share: int) -> None:
    async def scenario() -> None:
        link, rate = uplink(UplinkPolicy(rate=RATE), share), RATE / share
        came: list[tuple[float, int]] = []

        async def reader(size: int) -> None:
            came.extend(await read(link, size))

        async with trio.open_nursery() as nursery:
            for size in (5, 10, 20, 5, 8):
                nursery.start_soon(reader, size << 20)
        came.sort()
        total = 0
        for at, count in came:
            total += count
            assert total <= rate * (at + BURST_S + PORTION_S) + 1
        assert total == 48 << 20
        assert came[-1][0] == pytest.approx(total / rate - BURST_S, abs=2 * PORTION_S)

    play(scenario)


def test_after_a_pause_at_most_one_burst_exceeds_the_rate() -> None:
    async def scenario() -> None:
        link = uplink(UplinkPolicy(rate=RATE))
        await read(link, RATE)
        await trio.sleep(1000)
        start = trio.current_time()
        await read(link, 10 * RATE)
        assert trio.current_time() - start == pytest.approx(10 - BURST_S, abs=2 * PORTION_S)

    play(scenario)


def test_the_budget_gets_back_bytes_that_were_not_received() -> None:
    async def scenario() -> None:
        link = uplink(UplinkPolicy(rate=RATE, daily=100 * RATE))
        await read(link, RATE)
        start = trio.current_time()
        for _ in range(1000):
            link.came(await link.take(512 << 10), 10)
        for _ in range(20):
            with trio.move_on_after(0.001):
                await link.take(512 << 10)
                await trio.sleep_forever()
        assert link.use().used >= RATE + 10_000
        rng, total = Random(1), 0
        while total < 10 * RATE:
            taken = await link.take(512 << 10)
            count = rng.randint(0, taken.count)
            link.came(taken, count)
            total += count
        assert trio.current_time() - start <= 10 + 5 * BURST_S + 20 * PORTION_S

    play(scenario)


def test_names_do_not_wait_and_are_paid_by_the_bodies_after_them() -> None:
    async def scenario() -> None:
        link = uplink(UplinkPolicy(rate=RATE, daily=100 * RATE))
        link.note(3 * RATE)
        assert trio.current_time() == 0
        await read(link, 1)
        assert trio.current_time() == pytest.approx(3 - BURST_S)
        assert link.use().used == 3 * RATE + 1

    play(scenario)


def test_the_daily_budget_is_exact_and_renewed_at_midnight() -> None:
    async def scenario() -> None:
        link = uplink(UplinkPolicy(daily=10_000_000), share=2)
        with pytest.raises(UnavailableError, match="fake: the uplink budget of the day is spent: 5000000 bytes"):
            await read(link, 10_000_000)
        assert link.use().used == 5_000_000
        assert link.use().spent
        assert trio.current_time() == 0, "an error without a wait"
        with pytest.raises(UnavailableError):
            link.check(background=False)
        await trio.sleep(12 * 3600)
        assert not link.use().spent
        assert sum(count for _, count in await read(link, 4_000_000)) == 4_000_000
        assert link.use().used == 4_000_000

    play(scenario)


def test_foreground_bodies_continue_if_the_operator_allows_it_and_background_ones_do_not() -> None:
    async def scenario() -> None:
        part = UpstreamPart(name="fake", url="http://x", daily=OptionalSize("1MB"), daily_spent="allow")
        link = uplink(uplink_policy(part))
        await read(link, 5_000_000)
        assert link.use().used == 5_000_000
        with pytest.raises(UnavailableError):
            await read(link, 1, background=True)

    play(scenario)


def test_during_the_hours_nothing_is_limited_or_counted() -> None:
    async def scenario() -> None:
        rate, daily, night = OptionalSize("1MiB"), OptionalSize("10MiB"), Window("22:00-06:00")
        part = UpstreamPart(name="fake", url="http://x", rate=rate, daily=daily, hours=(night,))
        link = uplink(uplink_policy(part))
        await read(link, 10 << 20)
        assert link.use().spent
        with pytest.raises(UnavailableError):
            await read(link, 1)
        await trio.sleep(10 * 3600)
        assert link.use().free
        start = trio.current_time()
        await read(link, 1 << 30)
        await read(link, 1 << 30, background=True)
        assert trio.current_time() == start
        await trio.sleep(8 * 3600)
        assert not link.use().free
        assert link.use().used == 0, "the new day has a new count"

    play(scenario)


def test_background_bodies_make_way_while_a_client_waits() -> None:
    async def scenario() -> None:
        link = uplink(UplinkPolicy())
        await read(link, 1 << 20, background=True)
        with link.foreground():
            with pytest.raises(MakeWayError):
                await link.take(1, background=True)
            with trio.move_on_after(100) as waited:
                await link.turn()
            assert waited.cancelled_caught
        start = trio.current_time()
        await link.turn()
        assert trio.current_time() - start == QUIET_S
        assert await link.take(7, background=True) == Taken(7, True)

    play(scenario)


def test_background_bodies_wait_for_the_hours_if_any_are_configured() -> None:
    async def scenario() -> None:
        link = uplink(UplinkPolicy(hours=(NIGHT,)))
        await read(link, 1 << 30)
        with pytest.raises(UnavailableError, match="hours"):
            await link.turn()
        await trio.sleep(10 * 3600)
        await link.turn()
        await read(link, 1 << 30, background=True)

    play(scenario)


def test_a_new_rate_holds_at_once_also_for_waiting_bodies() -> None:
    async def scenario() -> None:
        link = uplink(UplinkPolicy(rate=1, daily=RATE))
        link.note(3600)  # a name: bodies after it wait for an hour
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, link, RATE // 2)
            await trio.sleep(60)
            link.change(UplinkPolicy(rate=RATE))
        assert 60.0 <= trio.current_time() <= 61.0
        assert link.use().used == RATE // 2 + 3600, "the use of the day is kept"
        began = trio.current_time()
        await read(link, 4 * RATE)
        assert trio.current_time() - began == pytest.approx(4.0, abs=2 * BURST_S + PORTION_S)

    play(scenario)


def test_a_daily_budget_added_later_is_kept_in_the_file(tmp_path: Path) -> None:
    async def scenario() -> None:
        path, link = tmp_path / "uplink.msgpack", uplink(UplinkPolicy())
        async with trio.open_nursery() as nursery:
            await nursery.start(UplinkFile(path, [link]).run)
            await trio.sleep(2 * SAVE_EVERY_S)
            assert not path.exists()
            link.change(UplinkPolicy(daily=1000))
            await read(link, 300)
            nursery.cancel_scope.cancel()
        again = uplink(UplinkPolicy(daily=1000))
        UplinkFile(path, [again]).load()
        assert again.use().used == 300

    play(scenario)


def test_the_use_of_the_day_outlives_a_restart_but_not_the_day(tmp_path: Path) -> None:
    async def scenario() -> None:
        path, policy = tmp_path / "uplink.msgpack", UplinkPolicy(daily=1000)

        async def life(use: int) -> int:
            link = uplink(policy)
            async with trio.open_nursery() as nursery:
                await nursery.start(UplinkFile(path, [link, Uplink("other", clock=clock)]).run)
                before = link.use().used
                await read(link, use)
                nursery.cancel_scope.cancel()
            return before

        assert await life(300) == 0
        assert await life(200) == 300
        assert await life(0) == 500
        await trio.sleep(24 * 3600)
        assert await life(0) == 0

    play(scenario)


def test_a_killed_process_loses_the_last_seconds_and_a_damaged_file_nothing_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        path, link = tmp_path / "uplink.msgpack", uplink(UplinkPolicy(daily=1000))
        path.write_bytes(b"\xff\x00 not msgpack")
        async with trio.open_nursery() as nursery:
            await nursery.start(UplinkFile(path, [link]).run)
            await read(link, 300)
            await trio.sleep(SAVE_EVERY_S + 1)
            left = path.read_bytes()
            await read(link, 50)
            nursery.cancel_scope.cancel()
        path.write_bytes(left)
        again = uplink(UplinkPolicy(daily=1000))
        UplinkFile(path, [again]).load()
        assert again.use().used == 300

    play(scenario)
