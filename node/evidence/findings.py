"""Whether a record is false, as this node can prove it: by the bytes of the whole object, which have its digest.

A single block from a registry proves nothing: whoever accuses chooses the registry, and a liar may control it. So only
bytes that hash to the object's digest show for certain that a record is false or true. It does not matter where they
come from: this node's store, the finder, or the registry.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial

import trio

from node.blocks.held_objects import holds_all, open_checked
from node.blocks.home import Home
from node.blocks.questions import Questions
from node.blocks.values import BlockAddress, Site, Stretch
from node.exchange.contract import Lane
from node.oci.references import Locator
from protocol.errors import BadInputError, ShoalError
from protocol.ids import BLOCK_SIZE, Buffer, ObjectRef, PeerId, Piece, Shard
from protocol.messages import ShardFound
from protocol.records import Record

log = logging.getLogger(__name__)

MAX_VERIFIED = 256 << 20
"""Bytes of the largest object that is read to verify its digest: nearly all layers are smaller. About records of larger
objects, only nodes that hold their files whole decide."""
SHOWING_S, READING_S = 30.0, 120.0
"""How long the finder, or a registry, may take to send the object: cases wait for each other, and a liar is slow."""

Read = Callable[[ObjectRef, int], Awaitable[Buffer | None]]
"""Returns a block, which may be wrong, or None."""


class Finding(Enum):
    """`FALSE` and `TRUE` are certain."""

    FALSE = auto()
    TRUE = auto()
    SEEMS_TRUE = auto()
    """The registry's block matches, but the object's other bytes were not read."""
    EXCUSED = auto()
    """False, but a mirror sends the same bytes: it may have deceived the signer."""


@dataclass(frozen=True, slots=True)
class Findings:
    """`mirrored` returns whether this node has mirrors for an upstream, whose bytes may differ from the registry's.

    `other` is a second record of the same signer and block, with other bytes. `source` is the location of their object.
    """

    site: Site
    home: Home
    questions: Questions
    mirrored: Callable[[str], bool]

    async def held(self, source: str, record: Record, other: Record | None = None) -> Finding | None:
        """The finding by the object that this node holds; None if it does not hold all of it."""
        if other is not None and not self._mirrored(source):
            return Finding.FALSE  # of two contradicting records one is, and no mirror can have deceived the signer
        truth = await self._held(record)
        return None if truth is None else await self._finding(source, truth, record, other)

    def blocks_held(self, record: Record) -> int:
        return self.site.tiers.holdings(record.object.digest).blocks.bit_count()

    async def shown(
        self, source: str, record: Record, other: Record | None = None, *, finder: PeerId
    ) -> Finding | None:
        """The finding by the object that the finder holds; None if it does not send all of it."""
        truth = None
        with trio.move_on_after(SHOWING_S):
            truth = await self._verified(record, partial(self._block_of, finder, source))
        return None if truth is None else await self._finding(source, truth, record, other)

    async def by_registry(self, source: str, record: Record, other: Record | None = None) -> Finding:
        """A block from the registry clears a record. To convict, all of the object is read. Raises ShoalError."""
        address = BlockAddress(Locator.parse(source), record.object, record.index)
        with trio.move_on_after(READING_S):
            if other is None and record.matches((await self.home.reread(address)).data):
                return Finding.SEEMS_TRUE
            if record.size > MAX_VERIFIED:
                raise BadInputError(f"{record.digest} is too large to be read for its digest")
            return await self._finding(source, await self.home.verified(address), record, other)
        raise BadInputError(f"{source} takes too long to send {record.digest}")

    async def _finding(self, source: str, truth: Buffer, *claims: Record | None) -> Finding:
        false = next((claim for claim in claims if claim is not None and not claim.matches(truth)), None)
        if false is None:
            return Finding.TRUE
        address = BlockAddress(Locator.parse(source), false.object, false.index)
        is_excused = self._mirrored(source) and await self.home.deceived(address, false)
        return Finding.EXCUSED if is_excused else Finding.FALSE

    def _mirrored(self, source: str) -> bool:
        return self.mirrored(Locator.parse(source).upstream)

    async def _held(self, record: Record) -> Buffer | None:
        """The block's bytes, if this node holds the whole object with the right digest."""
        opened = open_checked(self.site.tiers, record.object)
        if opened is not None:
            with opened[0] as file:
                return os.pread(file.fileno(), record.length, record.index * BLOCK_SIZE)
        return await self._verified(record, self._held_block) if holds_all(self.site.tiers, record.object) else None

    async def _held_block(self, ref: ObjectRef, index: int) -> Buffer | None:
        held = await self.site.tiers.get(Piece(ref.block(index)), ref.size, to_memory=False)
        return held[0].data if held is not None else None

    async def _block_of(self, peer: PeerId, source: str, ref: ObjectRef, index: int) -> Buffer | None:
        shown: list[Buffer] = []

        def part(message: ShardFound, body: Buffer) -> None:
            shown.append(body)

        stretch = Stretch(Locator.parse(source), ref, (index,))
        try:
            await self.questions.stream(peer, stretch, Shard(1, 0, 0), part, hops=0, lane=Lane.BULK)
        except ShoalError as error:
            log.debug("%s does not show block %d of %s: %s", peer, index, ref.digest, error)
        return shown[0] if shown else None

    async def _verified(self, record: Record, read: Read) -> Buffer | None:
        """The record's block, if `read` returns all blocks of its object, and these have its digest."""
        ref, block = record.object, None
        if ref.size > MAX_VERIFIED:
            return None
        hasher = hashlib.new(ref.digest.algorithm)
        for index in range(ref.block_count):
            data = await read(ref, index)
            if data is None:
                return None
            hasher.update(data)
            block = data if index == record.index else block
        return block if hasher.hexdigest() == ref.digest.hex else None
