"""p2pd, but every shard that it gives to others has one wrong bit: `python -m tests.support.liar --config FILE`."""

from __future__ import annotations

from node.daemon import main
from node.exchange import Answer
from node.seeder import Seeder
from protocol.ids import PeerId
from protocol.messages import ShardFound

_honest = Seeder.handle


async def _lie(self: Seeder, peer: PeerId, request: object) -> Answer:
    answer = await _honest(self, peer, request)
    if not isinstance(answer.message, ShardFound) or answer.body is None:
        return answer
    wrong = bytearray(answer.body)
    wrong[len(wrong) // 2] ^= 1
    return Answer(answer.message, wrong)


if __name__ == "__main__":
    Seeder.handle = _lie  # type: ignore[method-assign]
    main()
