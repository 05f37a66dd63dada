"""The members of the site, in a file: a restarted node finds its site even if no bootstrap address answers.

The file may be missing, old or wrong: its statements are checked as those from the network, and its members are only
asked, and enter the view when they answer. Format: docs/FORMATS.md, "Remembered peers".
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import trio

from node.membership.membership import Membership
from node.membership.passports import Passports
from node.runtime.state_files import load, save
from protocol.errors import UNDECODABLE, BadInputError, PeerMisbehavedError
from protocol.members import Statement, Vouched
from protocol.wire import check_statement

log = logging.getLogger(__name__)

VERSION = 2
MAX_REMEMBERED = 256
"""Most members in the file: one live member among them is enough. At some 650 bytes they are 170 KB."""
MAX_FILE = 4 << 20
"""Bytes: enough for MAX_REMEMBERED members whose texts are as long as the wire allows."""
SAVE_EVERY_S = 60.0
"""Changes come in bursts, and writes wear flash memory."""


class RememberedPeers(msgspec.Struct, frozen=True, array_like=True):
    """The form of `statements` depends on the version."""

    version: int
    statements: msgspec.Raw


STATEMENTS = msgspec.msgpack.Decoder(tuple[Statement, ...])


class PeersFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = b""

    def load(self) -> tuple[Statement, ...]:
        """Statements that are not checked. Empty if the file is missing, damaged or of another version."""
        file = load(self._path, RememberedPeers, MAX_FILE, "remembered peers")
        if file is None:
            return ()
        if file.version != VERSION:
            text = f"remembered peers are ignored: they have version {file.version}, and this node reads {VERSION}"
            log.warning(text, extra={"path": self._path})
            return ()
        try:
            return STATEMENTS.decode(file.statements)[:MAX_REMEMBERED]
        except UNDECODABLE as error:
            log.warning("remembered peers not readable", extra={"path": self._path, "reason": error})
            return ()

    async def read(self, passports: Passports) -> list[Vouched]:
        """The statements in the file that count."""
        vouched = []
        for statement in self.load():
            await trio.lowlevel.checkpoint()
            try:
                check_statement(statement)
                checked = passports.check(statement, None)
            except (BadInputError, PeerMisbehavedError) as error:
                log.debug("a remembered peer does not count", extra={"peer": statement.peer_id, "reason": error})
                continue
            if checked is not None:
                vouched.append(checked)
        return vouched

    def save(self, membership: Membership) -> None:
        """Replace the file by the site's members, live ones first. Without any member the file stays as it is."""
        statements = membership.to_remember(MAX_REMEMBERED)
        data = msgspec.msgpack.encode((VERSION, statements))
        if not statements or data == self._written:
            return
        if save(self._path, data, "remembered peers"):
            self._written = data

    async def run(
        self, membership: Membership, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Have `membership` ask the file's members. Then save changes, at most every SAVE_EVERY_S, and at the end."""
        membership.remembered(await self.read(membership.passports))
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
