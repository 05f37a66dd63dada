"""How nodes find each other and exchange certificates, before anything travels on the bulk channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from protocol.members import Member


class Swarm(Protocol):
    """Finds peers (static bootstrap addresses, mDNS), proves both sides to be of one cluster, and introduces them.

    - `run` listens, calls `task_status.started()` once it does, and works until cancelled: bootstrap addresses are
      tried again, with back-off, for as long as the peer behind one is not among `current()`.
    - Every introduction, in either direction, ends in one call of the `introduced` callback that it was built with,
      with the members that the other side named (itself first). A node of another cluster is never introduced;
      the refusal is logged with the peer id and the reason.
    """

    @property
    def addresses(self) -> tuple[str, ...]:
        """The multiaddrs that others can use, each with /p2p/<peer id>."""
        ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None: ...


Introduced = Callable[[tuple[Member, ...]], None]
Current = Callable[[], tuple[Member, ...]]
