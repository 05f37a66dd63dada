"""The tiers as one store, while several tasks use them."""

from __future__ import annotations

from hashlib import sha256
from typing import Any, cast

import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cache.memory import MemoryStore
from cache.store import READ_HERE, Held
from cache.tiered import Tiers
from node.identity.identity import Identity
from protocol.ids import Digest, ObjectRef, Piece
from protocol.records import make_record

DATA = b"a block"
REF = ObjectRef(Digest("sha256", "ab" * 32), len(DATA))
PIECE = Piece(REF.block(0))
BUDGET = 1 << 20


class SlowDisk(MemoryStore):
    """A disk tier whose reads end when `moves` is set."""

    def __init__(self) -> None:
        super().__init__(BUDGET, trio.current_time)
        self.moves = trio.Event()

    async def get(self, piece: Piece) -> Held | None:
        held = await super().get(piece)
        await self.moves.wait()
        return held


def test_a_piece_that_is_discarded_while_it_is_read_does_not_come_back() -> None:
    async def scenario() -> None:
        signer = Identity.of(Ed25519PrivateKey.generate())
        record = make_record(REF, 0, sha256(DATA).digest(), signer=signer.peer_id, sign=signer.sign)
        disk = SlowDisk()
        tiers = Tiers(MemoryStore(BUDGET, trio.current_time), cast(Any, disk), None)
        await disk.put(PIECE, DATA, record, kept_for=READ_HERE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tiers.get, PIECE)
            await trio.testing.wait_all_tasks_blocked()
            await tiers.discard(PIECE)
            disk.moves.set()
        assert not tiers.holds(PIECE)

    trio.run(scenario)
