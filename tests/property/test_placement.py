"""Placement: every node computes the same keepers, load is balanced, and a changed view moves as little as possible."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from protocol.ids import BLOCK_SIZE, BlockId, Digest, PeerId
from protocol.members import Member
from protocol.placement import HOME_HOPS, SMALL_BLOCK, Placement, Route, geometry

DIGEST = Digest("sha256", "ab" * 32)


def members(count: int, weight: float = 1.0) -> list[Member]:
    return [Member(PeerId(f"peer-{number:04d}"), f"n{number}", "site", (), weight=weight) for number in range(count)]


def homes(placement: Placement, blocks: int) -> list[PeerId]:
    return [placement.keepers(BlockId(DIGEST, index), BLOCK_SIZE)[1][0] for index in range(blocks)]


@given(st.integers(1, 40), st.integers(1, 10), st.integers(0, 4), st.integers(1, BLOCK_SIZE))
def test_a_geometry_never_needs_more_keepers_than_there_are(count: int, k: int, m: int, length: int) -> None:
    shape = geometry(count, k, m, length)
    assert 1 <= shape.k <= k
    assert 0 <= shape.m <= m
    assert shape.width <= count


def test_small_sites_have_the_codes_of_the_design() -> None:
    shapes = [(shape.k, shape.m) for shape in (geometry(count, 4, 1, BLOCK_SIZE) for count in range(1, 8))]
    assert shapes == [(1, 0), (1, 1), (2, 1), (3, 1), (4, 1), (4, 1), (4, 1)]
    assert geometry(9, 4, 1, SMALL_BLOCK).k == 1


@given(st.permutations(members(9)), st.integers(0, 10_000))
def test_the_order_of_the_view_does_not_matter(view: list[Member], index: int) -> None:
    block = BlockId(DIGEST, index)
    assert Placement(view, 4, 1).keepers(block, BLOCK_SIZE) == Placement(members(9), 4, 1).keepers(block, BLOCK_SIZE)


@given(st.integers(0, 9), st.integers(0, 10_000))
def test_a_member_that_leaves_moves_only_its_own_rank(gone: int, index: int) -> None:
    view, block = members(10), BlockId(DIGEST, index)
    before = Placement(view, 4, 1).keepers(block, BLOCK_SIZE)[1]
    after = Placement(view[:gone] + view[gone + 1 :], 4, 1).keepers(block, BLOCK_SIZE)[1]
    stayed = tuple(peer for peer in before if peer != view[gone].peer_id)
    assert after[: len(stayed)] == stayed


def test_homes_are_balanced() -> None:
    load = Counter(homes(Placement(members(10), 4, 1), 5000))
    assert max(load.values()) < 1.2 * 500
    assert min(load.values()) > 0.8 * 500


def test_a_weight_is_a_share_and_weight_zero_keeps_nothing() -> None:
    view = [
        *members(3),
        Member(PeerId("half"), "h", "site", (), weight=0.5),
        Member(PeerId("none"), "z", "site", (), weight=0.0),
    ]
    load = Counter(homes(Placement(view, 4, 1), 7000))
    assert load["none"] == 0
    assert 0.8 * 1000 < load["half"] < 1.2 * 1000


# Cells

SITES = st.tuples(st.integers(1, 200), st.integers(0, 10_000))
"""The number of members, and the index of a block."""


def routes(count: int, index: int) -> dict[PeerId, Route]:
    view = members(count)
    placement = Placement(view, 4, 1)
    return {member.peer_id: placement.route(member.peer_id, BlockId(DIGEST, index), BLOCK_SIZE) for member in view}


@given(SITES)
def test_all_members_see_one_tree(site: tuple[int, int]) -> None:
    ways = routes(*site)
    assert len({route.cells[-1] for route in ways.values()}) == 1
    for route in ways.values():
        for above, cell in enumerate(route.cells):
            assert all(ways[peer].cells == route.cells[above:] for peer in cell)


@given(SITES)
def test_a_cell_has_few_members_and_a_small_site_is_one_cell(site: tuple[int, int]) -> None:
    count, _ = site
    cells = Counter(route.cells for route in routes(*site).values())
    assert len(cells) == 1 or min(cells.values()) >= 5
    assert max(cells.values()) < 40
    assert count >= 10 or len(cells) == 1
    assert max(len(route) for route in cells) <= 6


@given(SITES, st.integers(HOME_HOPS, 16), st.integers(0, 4), st.data())
def test_waits_form_no_circle_even_if_members_have_different_views(
    site: tuple[int, int], hops: int, index: int, data: st.DataObject
) -> None:
    """Each member asks by a view of its own."""
    path = 0
    while hops >= HOME_HOPS:
        view = data.draw(st.integers(1, 200))
        route = data.draw(st.sampled_from(list(routes(view, site[1]).values())))
        sources = route.sources(index, hops)
        assert all(HOME_HOPS - 1 <= further < hops for further in sources.values())
        assert sources[route.home] == HOME_HOPS - 1
        hops = data.draw(st.sampled_from(list(sources.values())))
        path += 1
    assert path <= 15


def test_a_member_that_leaves_moves_nothing_in_other_cells() -> None:
    view = members(300)
    before, after = Placement(view, 4, 1), Placement(view[1:], 4, 1)
    moved = 0
    for index in range(300):
        block = BlockId(DIGEST, index)
        there, then = (
            before.route(view[150].peer_id, block, BLOCK_SIZE),
            after.route(view[150].peer_id, block, BLOCK_SIZE),
        )
        assert there.keepers == then.keepers
        moved += there.home != then.home
    assert moved < 300 * 0.02


def test_homes_and_keepers_are_balanced_in_a_large_site() -> None:
    view = members(300)
    placement = Placement(view, 4, 1)
    load = Counter(homes(placement, 15_000))
    assert max(load.values()) < 2 * 50
    assert len(load) == 300


def test_a_home_stays_the_same_when_the_cells_change() -> None:
    """The site grows from ten members to thirty, and one cell becomes several."""
    view = members(30)
    for index in range(100):
        block, before = BlockId(DIGEST, index), None
        for count in range(10, 31):
            home = Placement(view[:count], 4, 1).keepers(block, BLOCK_SIZE)[1][0]
            assert home in (before, view[count - 1].peer_id) or before is None
            before = home


def test_a_member_that_keeps_nothing_reads_from_the_cell_of_its_hash() -> None:
    view = [*members(100), Member(PeerId("none"), "z", "site", (), weight=0.0)]
    way = Placement(view, 4, 1).route(PeerId("none"), BlockId(DIGEST, 0), BLOCK_SIZE)
    assert way.cells in {route.cells for route in routes(100, 0).values()}
