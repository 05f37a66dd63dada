"""Placement: every node answers alike, load is balanced, and a changed view moves only what must move."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import BLOCK_SIZE, BlockId, Digest, PeerId
from protocol.members import Member
from protocol.placement import SMALL_BLOCK, Placement, geometry

DIGEST = Digest("sha256", "ab" * 32)


def members(count: int, weight: float = 1.0) -> list[Member]:
    return [Member(PeerId(f"peer-{number:04d}"), f"n{number}", "site", (), weight) for number in range(count)]


def homes(placement: Placement, blocks: int) -> list[PeerId]:
    return [placement.keepers(BlockId(DIGEST, index), BLOCK_SIZE)[1][0] for index in range(blocks)]


@given(st.integers(1, 40), st.integers(1, 10), st.integers(0, 4), st.integers(1, BLOCK_SIZE))
def test_a_geometry_never_needs_more_keepers_than_there_are(count: int, k: int, m: int, length: int) -> None:
    shape = geometry(count, k, m, length)
    assert 1 <= shape.k <= k
    assert 0 <= shape.m <= m
    assert shape.width <= count


def test_small_sites_have_the_codes_that_the_design_gives_them() -> None:
    shapes = [(shape.k, shape.m) for shape in (geometry(count, 4, 1, BLOCK_SIZE) for count in range(1, 8))]
    assert shapes == [(1, 0), (1, 1), (2, 1), (3, 1), (4, 1), (4, 1), (4, 1)]
    assert geometry(9, 4, 1, SMALL_BLOCK).k == 1


@given(st.permutations(members(9)), st.integers(0, 10_000))
def test_the_order_of_the_view_does_not_matter(view: list[Member], index: int) -> None:
    block = BlockId(DIGEST, index)
    assert Placement(view, 4, 1).keepers(block, BLOCK_SIZE) == Placement(members(9), 4, 1).keepers(block, BLOCK_SIZE)


@given(st.integers(0, 9), st.integers(0, 10_000))
def test_a_member_that_leaves_moves_only_its_own_place(gone: int, index: int) -> None:
    view, block = members(10), BlockId(DIGEST, index)
    before = Placement(view, 4, 1).keepers(block, BLOCK_SIZE)[1]
    after = Placement(view[:gone] + view[gone + 1 :], 4, 1).keepers(block, BLOCK_SIZE)[1]
    stayed = tuple(peer for peer in before if peer != view[gone].peer_id)
    assert after[: len(stayed)] == stayed


def test_homes_are_balanced() -> None:
    load = Counter(homes(Placement(members(10), 4, 1), 5000))
    assert max(load.values()) < 1.2 * 500
    assert min(load.values()) > 0.8 * 500


def test_a_weight_is_a_share_and_none_keeps_nothing() -> None:
    view = [*members(3), Member(PeerId("half"), "h", "site", (), 0.5), Member(PeerId("none"), "z", "site", (), 0.0)]
    load = Counter(homes(Placement(view, 4, 1), 7000))
    assert load["none"] == 0
    assert 0.8 * 1000 < load["half"] < 1.2 * 1000
