"""The members of the site, in a file: a restarted node finds its site even if no bootstrap address answers.

The file may be missing, old or wrong: its members are only asked, and enter the view when they answer. Format:
docs/FORMATS.md, "Remembered peers".
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
"""Most members in the file. One live member among them is enough."""
MAX_FILE = 4 << 20
"""Bytes: enough for MAX_REMEMBERED members whose texts are as long as the wire allows."""
SAVE_EVERY_S = 60.0
"""Changes come in bursts, and writes wear flash memory."""


class RememberedPeers(msgspec.Struct, frozen=True, array_like=True):
    version: Literal[1]
    members: tuple[Member, ...]


class PeersFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = b""

    def load(self) -> tuple[Member, ...]:
        """Empty if the file is missing or damaged."""
        file = load(self._path, RememberedPeers, MAX_FILE, "remembered peers")
        return file.members[:MAX_REMEMBERED] if file else ()

    def save(self, membership: Membership) -> None:
        """Replace the file by the site's members, live ones first. Without any member the file stays as it is."""
        rows = [row for row in membership.table() if row.member.site == membership.own.site]
        rows.sort(key=lambda row: (row.state >= State.DEAD, row.since_s))
        members = tuple(row.member for row in rows[:MAX_REMEMBERED])
        data = msgspec.msgpack.encode(RememberedPeers(1, members))
        if not members or data == self._written:
            return
        if save(self._path, data, "remembered peers"):
            self._written = data

    async def run(
        self, membership: Membership, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Have `membership` ask the file's members. Then save changes, at most every SAVE_EVERY_S, and at the end."""
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
