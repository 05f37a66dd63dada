"""Announces to the directories which objects this node holds: when an object is complete, when the view changes, and
every 30 s, because the entries of directories expire. Each round first frees disk space that is used twice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from itertools import islice

import trio

from node.blocks.questions import Questions
from node.blocks.values import SMALL_SILENCE_S, Site
from node.exchange.contract import Lane
from node.membership.membership import Membership
from protocol.directory import MAX_ANNOUNCED, Directory
from protocol.errors import ShoalError
from protocol.ids import Digest, ObjectRef, PeerId
from protocol.messages import Announce

log = logging.getLogger(__name__)

EVERY_S = 30.0
"""A quarter of a directory entry's time to live."""
BATCH = 256
"""Digests in one message."""


class Announcer:
    def __init__(
        self, site: Site, questions: Questions, directory: Directory, membership: Membership, trim: Callable[[], None]
    ) -> None:
        self._site, self._questions, self._directory = site, questions, directory
        self._membership, self._trim = membership, trim
        self._send, self._receive = trio.open_memory_channel[Digest](1024)

    def finished(self, ref: ObjectRef) -> None:
        """Announce an object that this node now holds whole. If the queue is full, the next round announces it."""
        try:
            self._send.send_nowait(ref.digest)
        except trio.WouldBlock:
            log.debug("announcement of %s waits for the next round", ref.digest)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce_finished)
            task_status.started()
            while True:
                with trio.move_on_after(EVERY_S):
                    await self._membership.wait_changed()
                await self._site.tiers.drop_doubles()
                self._trim()
                await self._announce(islice(self._site.tiers.objects(), MAX_ANNOUNCED))

    async def _announce_finished(self) -> None:
        async for digest in self._receive:
            await self._announce([digest])

    async def _announce(self, digests: Iterable[Digest]) -> None:
        by_peer: dict[PeerId, list[str]] = {}
        for digest in digests:
            for peer in self._site.placement().directory(digest):
                if peer == self._site.own:
                    self._directory.announce(digest, peer, trio.current_time())
                else:
                    by_peer.setdefault(peer, []).append(str(digest))
        async with trio.open_nursery() as nursery:
            for peer, texts in by_peer.items():
                nursery.start_soon(self._announce_to, peer, texts)

    async def _announce_to(self, peer: PeerId, digests: list[str]) -> None:
        for first in range(0, len(digests), BATCH):
            batch = Announce(tuple(digests[first : first + BATCH]))
            try:
                await self._questions.ask(peer, batch, Lane.CONTROL, SMALL_SILENCE_S)
            except ShoalError as error:
                log.debug("announcement to %s: %s", peer, error)
                return
