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
from node.exchange.contract import Answer
from node.oci.references import Locator
from node.registry.batching import BatchedReads, Came
from protocol.ids import ObjectRef, PeerId, Shard
from protocol.messages import GetBlock, GetShard, ShardFound
from protocol.shard_proofs import make_proof

_honest, _honest_stretch = Keeper.handle, BatchedReads.stretch


def _wrong(data: bytes | bytearray | memoryview) -> bytearray:
    wrong = bytearray(data)
    wrong[len(wrong) // 2] ^= 1
    return wrong


async def _lie(self: Keeper, peer: PeerId, request: GetShard | GetBlock) -> Answer:
    answer = await _honest(self, peer, request)
    if not isinstance(answer.message, ShardFound) or answer.body is None:
        return answer
    message, wrong = answer.message, _wrong(answer.body)
    if os.environ.get("LIE") == "signed":
        shard, signer = Shard(message.k, message.m, message.index), self._identity
        proof = make_proof(message.record, shard, wrong, maker=signer.peer_id, sign=signer.sign)
        message = msgspec.structs.replace(message, proof=proof)
    return Answer(message, wrong)


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
        Keeper.handle = _lie  # type: ignore[method-assign]
    main()
