"""The segmented policy: sums, pins, what may be evicted for whom, and the quotas of askers."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from cache.segments import PINNED, RESERVE, SegmentedPolicy
from cache.store import READ_HERE, Askers
from protocol.ids import BlockId, Digest, PeerId, Piece, Shard

BUDGET = 1000
MOST = 40
DIGESTS = [Digest("sha256", f"{number:064x}") for number in range(6)]
PIECES = [
    Piece(BlockId(digest, index), shard) for digest in DIGESTS for index in range(8) for shard in (None, Shard(4, 1, 0))
]
A, B, C, LIAR = (PeerId(name) for name in ("a", "b", "c", "liar"))
ASKERS: list[Askers] = [READ_HERE, (A,), (B,), (A, B), (B, A), (C,), (LIAR, A)]


@dataclass
class Store:
    """Keeps the bounds as real stores do."""

    pinned: set[Digest] = field(default_factory=set)
    now: float = 0.0
    held: dict[Piece, int] = field(default_factory=dict)
    kept_for: dict[Piece, Askers] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.policy = SegmentedPolicy[Piece](lambda: self.now, BUDGET, max_entries=MOST)

    def keeps(self, piece: Piece) -> bool:
        return piece.shard is None and piece.block.digest in self.pinned

    def put(self, piece: Piece, size: int, kept_for: Askers) -> bool:
        if kept_for:
            self.policy.wanted(size)
        if not kept_for:
            self.remove(self.policy.turnover(size))
        self.remove(self.policy.victims(size, kept_for, entries=1))
        if self.bytes + size > BUDGET or len(self.held) >= MOST:
            return False
        self.policy.add(piece, size, PINNED if self.keeps(piece) else kept_for)
        self.held[piece] = size
        self.kept_for[piece] = READ_HERE if self.keeps(piece) else kept_for
        return True

    def grow(self, piece: Piece, size: int) -> None:
        """As a run that gets one more block; a negative size is that of a block that it loses."""
        kept_for = PINNED if self.keeps(piece) else self.kept_for[piece]
        if 0 < size <= BUDGET - self.bytes:
            self.policy.add(piece, size, kept_for)
            self.held[piece] += size
        elif 0 < -size < self.held[piece]:
            self.policy.remove(piece, -size)
            self.held[piece] += size

    def move(self, pieces: list[Piece], segment: Askers) -> None:
        for piece in pieces:
            if piece.shard is None:
                self.policy.remove(piece)
                self.policy.add(piece, self.held[piece], segment)
                self.kept_for[piece] = READ_HERE

    def remove(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self.policy.remove(piece)
            del self.held[piece], self.kept_for[piece]

    @property
    def bytes(self) -> int:
        return sum(self.held.values())

    def used_here(self) -> set[Piece]:
        return {piece for piece, kept_for in self.kept_for.items() if not kept_for}

    def kept(self, peer: PeerId) -> int:
        return sum(self.held[piece] for piece, kept_for in self.kept_for.items() if peer in kept_for)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(PIECES), st.integers(1, 120), st.sampled_from(ASKERS)),
        st.tuples(
            st.sampled_from(["remove", "refer", "claim", "pin", "unpin"]),
            st.sampled_from(PIECES),
            st.just(0),
            st.just(READ_HERE),
        ),
        st.tuples(st.just("shrink"), st.sampled_from(PIECES), st.integers(0, 2 * BUDGET), st.just(READ_HERE)),
        st.tuples(st.just("grow"), st.sampled_from(PIECES), st.integers(-100, 100), st.just(READ_HERE)),
    ),
    max_size=80,
)


@given(actions, st.sets(st.sampled_from(DIGESTS), max_size=2))
def test_sums_and_victims(taken: list[tuple[str, Piece, int, Askers]], pinned: set[Digest]) -> None:
    store = Store(set(pinned))
    policy = store.policy
    for action, piece, size, kept_for in taken:
        store.now += 1
        of_object = [other for other in store.held if other.block.digest == piece.block.digest]
        used_here = store.used_here()
        match action:
            case "put" if piece not in store.held:
                pins = {block for block in store.held if store.keeps(block)}
                store.put(piece, size, kept_for)
                assert pins <= set(store.held)
                assert not kept_for or used_here <= set(store.held), "evicted what is used here for a member"
            case "remove" if piece in store.held:
                store.remove([piece])
            case "refer" if piece in store.held:
                policy.refer(piece)
            case "claim" if piece in store.held:
                assert policy.claim(piece) == bool(store.kept_for[piece])
                store.kept_for[piece] = READ_HERE
            case "grow" if piece in store.held:
                store.grow(piece, size)
            case "pin":
                store.move(of_object, PINNED)
                store.pinned.add(piece.block.digest)
            case "unpin" if piece.block.digest in store.pinned:
                store.move(of_object, READ_HERE)
                store.pinned.discard(piece.block.digest)
            case "shrink":
                victims = policy.victims(size)
                freed = sum(store.held[victim] for victim in victims)
                kept = sum(store.held[block] for block in store.held if store.keeps(block))
                assert not any(store.keeps(victim) for victim in victims)
                assert BUDGET - store.bytes + freed >= min(size, BUDGET - kept)
                on_probation = set(store.held) - used_here
                assert used_here.isdisjoint(victims) or on_probation <= set(victims), "probation goes first"
        keeps = {block for block in store.held if store.keeps(block)}
        assert policy.bytes == store.bytes <= BUDGET
        assert policy.pinned_bytes == sum(store.held[block] for block in keeps)
        assert policy.probation_bytes == sum(store.held[p] for p, askers in store.kept_for.items() if askers)
        assert all(policy.kept_for(p) == askers for p, askers in store.kept_for.items())


earlier = st.lists(st.sampled_from(ASKERS), max_size=100)
sizes = st.sampled_from([20, 60])
"""Of equal pieces. Of the smaller ones their number binds, of the larger ones their bytes."""


def pieces(number: int) -> Piece:
    return Piece(BlockId(Digest("sha256", f"{1000 + number:064x}"), 0), None)


def filled(before: list[Askers], size: int) -> Store:
    """A full store. The liar had nothing kept before."""
    store = Store()
    for number, kept_for in enumerate([*before, *[(A, B), (B, A), (C, A), (A, C), (C,)] * 8]):
        if LIAR not in kept_for:
            store.put(pieces(number), size, kept_for)
    assert store.held
    return store


def quota(store: Store, size: int) -> int:
    """Half of the room for probation, as number of pieces; there are few askers."""
    return (min(MOST, BUDGET // size) - len(store.used_here())) // 2


@given(earlier, sizes, st.lists(st.sampled_from(ASKERS[1:6]), min_size=1, max_size=200))
def test_a_member_that_names_others_as_askers_displaces_no_more_than_its_quota(
    before: list[Askers], size: int, named: list[Askers]
) -> None:
    """S-59"""
    store = filled(before, size)
    kept_before, most = set(store.held), quota(store, size)
    for number, askers in enumerate(named):
        store.now += 1
        store.put(pieces(10_000 + number), size, (LIAR, askers[0]))
        assert store.kept(LIAR) <= max(most, 1) * size
    assert len(kept_before - set(store.held)) <= most + len(ASKERS)


@given(earlier, sizes, st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=200))
def test_a_member_that_asks_through_others_displaces_no_more_than_its_quota(
    before: list[Askers], size: int, through: list[PeerId]
) -> None:
    """S-59: honest members pass its name on: each block is charged to it, and to one of them."""
    store = filled(before, size)
    kept_before, most = set(store.held), quota(store, size)
    for number, peer in enumerate(through):
        store.now += 1
        store.put(pieces(10_000 + number), size, (peer, LIAR))
        assert store.kept(LIAR) <= (max(most, 1) + len(ASKERS)) * size
    assert len(kept_before - set(store.held)) <= most + 2 * len(ASKERS)


def test_members_have_their_part_although_clients_filled_the_store() -> None:
    store = Store()
    for number in range(60):
        store.put(pieces(number), 25, READ_HERE)
    assert store.bytes == BUDGET, "alone, a node uses all its room"
    for number in range(100, 110):
        assert not store.put(pieces(number), 25, (A,)), "nothing that is used here is evicted for a member"
    for number in range(200, 230):
        assert store.put(pieces(number), 25, READ_HERE)
        store.put(pieces(number + 100), 25, (A,))
    assert store.policy.probation_bytes == BUDGET // RESERVE
    for number in range(400, 430):
        assert store.put(pieces(number), 25, READ_HERE)
    assert store.policy.probation_bytes == BUDGET // RESERVE, "the reserve stays"


def test_a_single_reader_may_have_all_room_that_nothing_uses() -> None:
    store = Store()
    for number in range(60):
        assert store.put(pieces(number), 25, (A,))
    assert store.kept(A) == BUDGET
    for number in range(100, 160):
        assert store.put(pieces(number), 25, READ_HERE)
    assert store.kept(A) == BUDGET // RESERVE
