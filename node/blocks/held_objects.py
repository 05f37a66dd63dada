"""Objects as the tiers of this node hold them: their bytes, and the digest of these bytes.

Each block matches a record that a member signed. Only the digest over all blocks shows that these records are true.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import BinaryIO

from cache.store import Holdings
from cache.tiered import Tier, Tiers
from protocol.ids import BLOCK_SIZE, Buffer, ObjectRef, Piece


def holds_all(tiers: Tiers, ref: ObjectRef) -> bool:
    blocks = tiers.holdings(ref.digest).blocks
    return blocks.bit_count() == blocks.bit_length() == ref.block_count


def bytes_held(holdings: Holdings, ref: ObjectRef) -> int:
    """Bytes of the blocks that an object of this size has, and that are held. The work depends on what is held, since
    the size may be a claim."""
    if not ref.size:
        return 0
    last = ref.block_count - 1
    full = holdings.blocks & ~(-1 << min(last, holdings.blocks.bit_length()))
    return full.bit_count() * BLOCK_SIZE + (holdings.blocks >> last & 1) * ref.block_length(last)


async def has_record(tiers: Tiers, ref: ObjectRef) -> bool:
    """Whether a block is held whose signer read it from an object of this size. The first held block is looked at."""
    blocks = tiers.holdings(ref.digest).blocks
    first = (blocks & -blocks).bit_length() - 1
    return 0 <= first < ref.block_count and await tiers.get(Piece(ref.block(first)), ref.size) is not None


async def held_body(tiers: Tiers, ref: ObjectRef) -> bytes | None:
    """The bytes of a small object, not compared with its digest; None if a block is missing."""
    blocks = [await tiers.get(Piece(ref.block(index)), ref.size) for index in range(ref.block_count)]
    return b"".join(block[0].data for block in blocks if block is not None) if None not in blocks else None


async def hash_held(
    tiers: Tiers, ref: ObjectRef, pause: Callable[[], Awaitable[None]] | None = None
) -> tuple[str, Buffer] | None:
    """The digest of all blocks in hexadecimal, and the last block; None if a block is missing. A background check has
    `pause` awaited before each block, and its blocks do not displace others from memory."""
    hasher = hashlib.new(ref.digest.algorithm)
    data: Buffer = b""
    for index in range(ref.block_count):
        if pause is not None:
            await pause()
        block = await tiers.get(Piece(ref.block(index)), ref.size, to_memory=pause is None)
        if block is None:
            return None
        data = block[0].data
        hasher.update(data)
    return hasher.hexdigest(), data


def open_checked(tiers: Tiers, ref: ObjectRef) -> tuple[BinaryIO, Tier] | None:
    """A file of exactly this object, whose digest this process has checked, and its tier; the caller closes it."""
    sealed = tiers.open_sealed(ref.digest)
    if sealed is None:
        return None
    with ExitStack() as stack:
        file = stack.enter_context(sealed[0])
        if os.fstat(file.fileno()).st_size != ref.size:
            return None
        stack.pop_all()
        return file, sealed[1]


async def is_right(tiers: Tiers, ref: ObjectRef) -> bool:
    """Whether all of the object is held and has its digest."""
    if (opened := open_checked(tiers, ref)) is not None:
        opened[0].close()
        return True
    hashed = await hash_held(tiers, ref) if holds_all(tiers, ref) else None
    return hashed is not None and hashed[0] == ref.digest.hex
