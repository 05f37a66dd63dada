"""Pins beside the eviction policy: what is charged adds up, and what is pinned is never named."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cache.lru_k import LRUKCache
from cache.pieces import UNBOUNDED
from cache.pinned import PinnedPolicy
from protocol.ids import BlockId, Digest, Piece, Shard

BUDGET = 1000
DIGESTS = [Digest("sha256", f"{number:064x}") for number in range(4)]
PIECES = [
    Piece(BlockId(digest, index), shard) for digest in DIGESTS for index in range(4) for shard in (None, Shard(4, 1, 0))
]

actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(PIECES), st.integers(1, 120)),
        st.tuples(st.just("remove"), st.sampled_from(PIECES), st.just(0)),
        st.tuples(st.just("refer"), st.sampled_from(PIECES), st.just(0)),
        st.tuples(st.just("pin"), st.sampled_from(PIECES), st.just(0)),
        st.tuples(st.just("unpin"), st.sampled_from(PIECES), st.just(0)),
        st.tuples(st.just("evict"), st.sampled_from(PIECES), st.integers(0, 2 * BUDGET)),
    ),
    max_size=60,
)


@given(actions, st.sets(st.sampled_from(DIGESTS)))
def test_sums_and_victims(taken: list[tuple[str, Piece, int]], pinned: set[Digest]) -> None:
    clock = [0.0]
    policy = PinnedPolicy(LRUKCache(UNBOUNDED, int, timer=lambda: clock[0]), frozenset(pinned), BUDGET)
    held: dict[Piece, int] = {}
    for action, piece, size in taken:
        clock[0] += 1
        of_object = [other for other in held if other.block.digest == piece.block.digest]
        match action:
            case "add" if piece not in held and sum(held.values()) + size <= BUDGET:
                policy.add(piece, size)
                held[piece] = size
            case "remove" if piece in held:
                policy.remove(piece)
                del held[piece]
            case "refer":
                policy.refer(piece)
            case "pin":
                policy.pin(piece.block.digest, of_object)
                pinned.add(piece.block.digest)
            case "unpin":
                policy.unpin(piece.block.digest, of_object)
                pinned.discard(piece.block.digest)
            case "evict":
                victims = policy.victims(size)
                kept = sum(held[other] for other in held if policy.keeps(other))
                assert not any(policy.keeps(victim) for victim in victims)
                freed = sum(held[victim] for victim in victims)
                assert BUDGET - sum(held.values()) + freed >= min(size, BUDGET - kept)
        keeps = {other for other in held if other.shard is None and other.block.digest in pinned}
        assert {other for other in held if policy.keeps(other)} == keeps
        assert policy.bytes == sum(held.values())
        assert policy.kept_bytes == sum(held[other] for other in keeps)
