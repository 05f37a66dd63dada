"""The contract of everything that stores pieces.

A store maps a `Piece` (a whole block or one shard) to its bytes, the signed `Record` of its block, and for a shard
its maker's proof. All stores keep these promises, which tests/conformance/test_store.py checks for each of them:

- `get` never returns a wrong byte. A whole block has been hashed against its record's sha256, a shard against the
  sha256 that was noted when it was put, since the bytes last could have changed outside this process. A piece that
  fails the check is discarded and logged once, and the answer is None: it is a miss, never an error.
- The caller of `put` has checked that `proof` is about these bytes: its sha256 is then not computed again.
- `get` counts as a reference for the eviction policy; `holds` and `holdings` do not, and read no data.
- `put` stores all or nothing and may decline (False): no space under the budget, no free disk, a read-only store.
  The caller still has the bytes. A full store evicts by its policy first. Putting a piece twice changes nothing.
- A piece that was put `kept_for` members is on probation (`cache/segments.py`) until `claim`, or another put without
  `kept_for`, says that a client of this node used it. Such a put evicts pieces on probation only. `is_used_here`: the
  piece is held and not on probation.
- `signed_by` returns the held pieces of an object whose record has this signer, and the records.
- `objects` returns the objects of which at least one piece is held, in any order.
- The bytes held never exceed `budget_bytes`; space is reserved before it is written.
- Every method may be cancelled at any await and leaves the store whole.
- A store does not alter the bytes that it returned; the caller does not alter them either.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from protocol.ids import Buffer, Digest, PeerId, Piece, Shard
from protocol.records import Record
from protocol.shard_proofs import ShardProof

Askers = tuple[PeerId, ...]
"""The members that had this node keep a piece: the one that asked, then the one that it asked for, if it is another."""
READ_HERE: Askers = ()
"""Instead of askers: a client of this node used the piece."""


class Held(NamedTuple):
    """Checked bytes from a store, with the record of the block that they belong to, and of a shard the proof."""

    data: Buffer
    record: Record
    proof: ShardProof | None = None


@dataclass(frozen=True, slots=True)
class Holdings:
    """Pieces of one object. A bitmap has bit i (LSB first, as in `1 << i`) set for block i."""

    blocks: int = 0
    shards: Mapping[Shard, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    bytes: int
    budget_bytes: int
    entries: int
    pinned_bytes: int = 0
    probation_bytes: int = 0
    """Of pieces that are kept for members only."""


class BlockStore(Protocol):
    async def get(self, piece: Piece) -> Held | None: ...

    async def put(
        self,
        piece: Piece,
        data: Buffer,
        record: Record,
        proof: ShardProof | None = None,
        *,
        kept_for: Askers = READ_HERE,
    ) -> bool: ...

    def claim(self, piece: Piece) -> None: ...

    def is_used_here(self, piece: Piece) -> bool: ...

    async def discard(self, piece: Piece) -> None: ...

    def holds(self, piece: Piece) -> bool: ...

    def holdings(self, digest: Digest) -> Holdings: ...

    async def signed_by(self, signer: PeerId, digest: Digest) -> dict[Piece, Record]: ...

    def objects(self) -> Iterable[Digest]: ...

    def statistics(self) -> StoreStatistics: ...
