"""The members that this node knew last, in a file: so that it finds its site when every bootstrap address is silent.

Nothing depends on it being there, new or true: what it names is only asked. Bytes: docs/FORMATS.md, "Remembered peers".
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import trio

from node.membership.membership import Membership
from node.runtime.state_files import load, save
from protocol.members import Member, State

MAX_REMEMBERED = 1024
"""One of them alive is enough."""
MAX_FILE = 4 << 20
"""That many members at the wire's bounds of their texts."""
SAVE_EVERY_S = 60.0
"""Changes come in bursts, and flash wears."""


class _File(msgspec.Struct, frozen=True, array_like=True):
    version: Literal[1]
    members: tuple[Member, ...]


class RememberedPeers:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = b""

    def load(self) -> tuple[Member, ...]:
        """Empty where there is no such file, or a damaged one."""
        found = load(self._path, _File, MAX_FILE, "remembered peers")
        return found.members[:MAX_REMEMBERED] if found else ()

    def save(self, membership: Membership) -> None:
        """The site's members, live ones first, replacing the file whole. Without any, what is there stays."""
        rows = [row for row in membership.table() if row.member.site == membership.own.site]
        rows.sort(key=lambda row: (row.state >= State.DEAD, row.since_s))
        members = tuple(row.member for row in rows[:MAX_REMEMBERED])
        data = msgspec.msgpack.encode(_File(1, members))
        if not members or data == self._written:
            return
        if save(self._path, data, "remembered peers"):
            self._written = data

    async def run(
        self, membership: Membership, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Has the remembered asked, then saves: after changes, at most once a minute, and at the end."""
        membership.remembered(self.load())
        task_status.started()
        try:
            while True:
                saved = membership.version
                self.save(membership)
                await trio.sleep(SAVE_EVERY_S)
                if membership.version == saved:
                    await membership.wait_changed()
        finally:
            self.save(membership)
