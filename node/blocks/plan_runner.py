"""Carries out a plan of protocol/fetch_plan.py: its requests in tasks, what comes of them back into the plan."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from protocol.fetch_plan import Ask, ShardPlan

T = TypeVar("T")


async def carry_out(
    plan: ShardPlan,
    asks: list[Ask],
    ask: Callable[[Ask], Awaitable[T]],
    note: Callable[[Ask, T], list[Ask]],
    overdue: Callable[[], list[Ask]],
    every_s: float = math.inf,
) -> None:
    """Until the plan is done or stuck; requests still under way are then cancelled.

    `asks` are the first requests, `note` and `overdue` return the further ones; `overdue` is asked when the plan wants
    it, and after `every_s` without news. What `ask` raises ends all.
    """
    send, receive = trio.open_memory_channel[tuple[Ask, T]](len(asks))

    async def one(what: Ask) -> None:
        await send.send((what, await ask(what)))

    async with trio.open_nursery() as nursery:
        for what in asks:
            nursery.start_soon(one, what)
        while not plan.done and not plan.stuck:
            more: list[Ask] = []
            with trio.move_on_at(min(plan.next_check(), trio.current_time() + every_s)) as waiting:
                more = note(*await receive.receive())
            for what in overdue() if waiting.cancelled_caught else more:
                nursery.start_soon(one, what)
        nursery.cancel_scope.cancel()
