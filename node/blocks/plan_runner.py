"""Carries out a plan of protocol/fetch_plan.py: makes its requests in tasks, and reports their answers to the plan."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from node.blocks.values import LOOK_EVERY_S
from protocol.fetch_plan import Ask, ShardPlan

T = TypeVar("T")


async def carry_out(
    plan: ShardPlan,
    asks: list[Ask],
    ask: Callable[[Ask], Awaitable[T]],
    *,
    note: Callable[[Ask, T], list[Ask]],
    overdue: Callable[[], list[Ask]],
) -> None:
    """Returns when the plan is done or stuck. Requests that are still under way are then cancelled.

    `asks` are the first requests. `ask` makes one; an exception that it raises ends the plan. `note` takes its answer
    and returns further requests. So does `overdue`, which is called when the plan's next check is due, and after
    LOOK_EVERY_S without an answer.
    """
    send, receive = trio.open_memory_channel[tuple[Ask, T]](len(asks))

    async def make(request: Ask) -> None:
        await send.send((request, await ask(request)))

    async with trio.open_nursery() as nursery:
        for request in asks:
            nursery.start_soon(make, request)
        while not plan.done and not plan.stuck:
            more: list[Ask] = []
            with trio.move_on_at(min(plan.next_check(), trio.current_time() + LOOK_EVERY_S)) as waiting:
                more = note(*await receive.receive())
            for request in overdue() if waiting.cancelled_caught else more:
                nursery.start_soon(make, request)
        nursery.cancel_scope.cancel()
