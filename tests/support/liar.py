"""A p2pd that lies to other members: `LIE=shards python -m tests.support.liar --config FILE`.

`shards`: every shard that it serves has one wrong bit. `signed`: the same, and it signs the wrong shards. `records`:
every block that it reads from the registry for an object of several blocks has one wrong bit, and it signs records for
these wrong blocks.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

from node.blocks.keeper import Keeper
from node.daemon import main
from node.exchange.contract import Sender
from node.identity.identity import Identity
from node.oci.references import Locator
from node.registry.batching import BatchedReads, Came
from protocol.errors import ShoalError
from protocol.ids import Buffer, ObjectRef, PeerId, Shard
from protocol.messages import GetShards, ShardFound
from protocol.shard_proofs import make_proof

_honest, _honest_at_once, _honest_stretch = Keeper.handle, Keeper.at_once, BatchedReads.stretch


def _wrong(data: Buffer) -> bytearray:
    wrong = bytearray(data)
    wrong[len(wrong) // 2] ^= 1
    return wrong


class _Lying:
    """A `Sender` that alters each part."""

    def __init__(self, sender: Sender, signer: Identity | None) -> None:
        self._sender, self._signer = sender, signer

    def send(self, message: ShardFound, body: Buffer) -> None:
        wrong = _wrong(body)
        if self._signer is not None:
            shard = Shard(message.k, message.m, message.index)
            proof = make_proof(message.record, shard, wrong, maker=self._signer.peer_id, sign=self._signer.sign)
            message = msgspec.structs.replace(message, proof=proof)
        self._sender.send(message, wrong)

    async def room(self) -> None:
        await self._sender.room()

    def coming(self) -> None:
        self._sender.coming()

    def end(self, error: ShoalError) -> None:
        self._sender.end(error)


def _lying(identity: Identity, sender: Sender) -> _Lying:
    return _Lying(sender, identity if os.environ.get("LIE") == "signed" else None)


async def _lie(self: Keeper, peer: PeerId, request: GetShards, sender: Sender) -> None:
    await _honest(self, peer, request, _lying(self._identity, sender))


def _lie_at_once(self: Keeper, peer: PeerId, request: GetShards, sender: Sender) -> bool:
    return _honest_at_once(self, peer, request, _lying(self._identity, sender))


async def _misread(
    self: BatchedReads, locator: Locator, ref: ObjectRef, first: int, count: int, came: Came, **how: Any
) -> None:
    def lie(index: int, data: bytearray) -> None:
        came(index, _wrong(data) if ref.block_count > 1 else data)

    await _honest_stretch(self, locator, ref, first, count, came=lie, **how)


if __name__ == "__main__":
    if os.environ.get("LIE") == "records":
        BatchedReads.stretch = _misread  # type: ignore[method-assign]
    else:
        Keeper.handle, Keeper.at_once = _lie, _lie_at_once  # type: ignore[method-assign]
    main()
