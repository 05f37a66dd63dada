"""Placement: every node computes the same keepers, load is balanced, and a changed view moves as little as possible."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from itertools import chain, pairwise

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from protocol.balance import GROUP_STRIPES
from protocol.ids import BLOCK_SIZE, Digest, PeerId
from protocol.members import Member
from protocol.placement import HOME_HOPS, SMALL_BLOCK, Placement, Route, geometry
from protocol.stripes import StripeId


def members(count: int, weight: float = 1.0) -> list[Member]:
    return [Member(PeerId(f"peer-{number:04d}"), f"n{number}", "site", (), weight=weight) for number in range(count)]


def stripe(number: int) -> StripeId:
    """A stripe of one of several objects."""
    return StripeId(Digest("sha256", f"{number // 100:064x}"), number % 100)


def keepers(placement: Placement, number: int) -> tuple[PeerId, ...]:
    return placement.keepers(stripe(number), BLOCK_SIZE)[1]


def homes(placement: Placement, stripes: range) -> list[PeerId]:
    return [keepers(placement, number)[0] for number in stripes]


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
def test_the_order_of_the_view_does_not_matter(view: list[Member], number: int) -> None:
    assert keepers(Placement(view, 4, 1), number) == keepers(Placement(members(9), 4, 1), number)


@given(st.lists(st.integers(0, 3 * GROUP_STRIPES), min_size=1, max_size=6), st.integers(1, 60))
def test_the_order_of_the_questions_does_not_matter(numbers: list[int], count: int) -> None:
    view = members(count)
    asked_before = Placement(view, 4, 1)
    for number in numbers:
        own = view[number % count].peer_id
        fresh = Placement(view, 4, 1).route(own, stripe(number), BLOCK_SIZE)
        assert asked_before.route(own, stripe(number), BLOCK_SIZE) == fresh


def test_the_keepers_are_those_of_the_document() -> None:
    """docs/PROTOCOL.md, "Placement", computed without numpy: any implementation must agree."""
    view = [replace(member, weight=1 + at / 10) for at, member in enumerate(members(5))]
    width, digest, whole = 3, stripe(0).digest, sum(member.weight for member in view)
    kept: Counter[PeerId] = Counter()
    read: Counter[PeerId] = Counter()

    def distance(member: Member, number: int, rank: int) -> float:
        key = mix((hash64(f"{digest}/0") + (number * width + rank) * 0x9E3779B97F4A7C15) % 2**64)
        fraction = ((mix(hash64(member.peer_id) ^ key) >> 11) + 0.5) / 2**53
        return math.log(-math.log(fraction) / member.weight)

    placement = Placement(view, 2, 1)
    for number in range(GROUP_STRIPES):
        part = {member.peer_id: number * member.weight / whole for member in view}
        from_home = {
            member.peer_id: distance(member, number, 0) + read[member.peer_id] - part[member.peer_id] for member in view
        }
        expected = [min(from_home, key=from_home.__getitem__)]
        for rank in range(1, width):
            distances = {
                member.peer_id: distance(member, number, rank) + kept[member.peer_id] - width * part[member.peer_id]
                for member in view
                if member.peer_id not in expected
            }
            expected.append(min(distances, key=distances.__getitem__))
        read[expected[0]] += 1
        kept.update(expected)
        assert placement.keepers(StripeId(digest, number), BLOCK_SIZE)[1] == tuple(expected)


def mix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@given(st.integers(1, 12), st.integers(0, 10_000), st.integers(1, BLOCK_SIZE))
def test_keepers_are_distinct_and_as_many_as_the_code_has_shards(count: int, number: int, length: int) -> None:
    shape, peers = Placement(members(count), 4, 1).keepers(stripe(number), length)
    assert len(set(peers)) == len(peers) == shape.width


def test_a_small_block_has_the_first_keepers_of_its_stripe() -> None:
    placement = Placement(members(10), 4, 1)
    for number in range(50):
        shape, peers = placement.keepers(stripe(number), SMALL_BLOCK)
        assert (shape.k, shape.m) == (1, 1)
        assert peers == keepers(placement, number)[:2]


def test_a_member_that_leaves_moves_few_shards() -> None:
    """At best a tenth. Independent hashing moves 30 %, since each later rank takes the place of an earlier one."""
    view = members(10)
    before = Placement(view, 4, 1)
    same = homes_same = 0
    for gone in range(10):
        after = Placement(view[:gone] + view[gone + 1 :], 4, 1)
        for number in range(0, 500, 2):
            stayed = [old == new for old, new in zip(keepers(before, number), keepers(after, number), strict=True)]
            same += sum(stayed)
            homes_same += stayed[0]
    assert same > 0.62 * 10 * 250 * 5
    assert homes_same > 0.70 * 10 * 250


@given(st.integers(0, 1_000), st.integers(5, 10))
def test_all_members_keep_and_read_about_the_same_of_an_object(content: int, count: int) -> None:
    placement = Placement(members(count), 4, 1)
    stripes = [StripeId(Digest("sha256", f"{content:064x}"), number) for number in range(50)]
    kept = [placement.keepers(stripe_id, BLOCK_SIZE)[1] for stripe_id in stripes]
    places, read = Counter(chain.from_iterable(kept)), Counter(peers[0] for peers in kept)
    assert max(places.values()) <= 250 / count + 5
    assert min(places.values()) >= 250 / count - 5
    assert max(read.values()) <= 50 / count + 4
    assert min(read.values()) >= 50 / count - 4


def test_homes_are_balanced() -> None:
    load = Counter(homes(Placement(members(10), 4, 1), range(2000)))
    assert max(load.values()) < 1.1 * 200
    assert min(load.values()) > 0.9 * 200


def test_a_weight_is_a_share_and_weight_zero_keeps_nothing() -> None:
    view = [
        *members(3),
        Member(PeerId("half"), "h", "site", (), weight=0.5),
        Member(PeerId("none"), "z", "site", (), weight=0.0),
    ]
    load = Counter(map(str, homes(Placement(view, 4, 1), range(2100))))
    assert load["none"] == 0
    assert 0.9 * 300 < load["half"] < 1.1 * 300


def test_shards_are_kept_by_weight_but_at_most_one_of_each_stripe() -> None:
    """Of five places two members of weight 2 get one each, and six of weight 1/2 half a place each."""
    big = [Member(PeerId(f"big-{number}"), "b", "site", (), weight=2.0) for number in range(2)]
    small = members(6, weight=0.5)
    placement = Placement([*big, *small], 4, 1)
    load = Counter(chain.from_iterable(keepers(placement, number) for number in range(1000)))
    assert all(load[member.peer_id] > 0.95 * 1000 for member in big)
    assert all(0.9 * 500 < load[member.peer_id] < 1.1 * 500 for member in small)


# Cells

SITES = st.tuples(st.integers(1, 200), st.integers(0, 10_000))
"""The number of members, and the number of a stripe."""


def routes(count: int, number: int) -> dict[PeerId, Route]:
    view = members(count)
    placement = Placement(view, 4, 1)
    return {member.peer_id: placement.route(member.peer_id, stripe(number), BLOCK_SIZE) for member in view}


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


@given(SITES)
def test_the_home_has_rank_0_in_the_root_cell_only(site: tuple[int, int]) -> None:
    for route in routes(*site).values():
        assert route.home == route.cells[-1][0]
        assert all(route.home not in cell for cell in route.cells[:-1])


def test_a_member_that_leaves_moves_hardly_anything_in_other_cells() -> None:
    view = members(300)
    before, after = Placement(view, 4, 1), Placement(view[1:], 4, 1)
    moved = homes_moved = 0
    for number in range(300):
        there = before.route(view[150].peer_id, stripe(number), BLOCK_SIZE)
        then = after.route(view[150].peer_id, stripe(number), BLOCK_SIZE)
        moved += there.keepers != then.keepers
        homes_moved += there.home != then.home
    assert moved < 300 * 0.02
    assert homes_moved < 300 * 0.04


def test_homes_and_keepers_are_balanced_in_a_large_site() -> None:
    view = members(300)
    placement = Placement(view, 4, 1)
    load = Counter(homes(placement, range(6_000)))
    assert max(load.values()) < 1.8 * 20
    assert len(load) == 300


def test_few_homes_move_when_the_cells_change() -> None:
    """The site grows from ten members to thirty, and one cell becomes several."""
    view = members(30)
    sites = [Placement(view[:count], 4, 1) for count in range(10, 31)]
    for before, after in pairwise(sites):
        moved = sum(old != new for old, new in zip(homes(before, range(100)), homes(after, range(100)), strict=True))
        assert moved < 40


def test_a_member_that_keeps_nothing_reads_from_the_cell_of_its_hash() -> None:
    view = [*members(100), Member(PeerId("none"), "z", "site", (), weight=0.0)]
    way = Placement(view, 4, 1).route(PeerId("none"), stripe(0), BLOCK_SIZE)
    assert way.cells in {route.cells for route in routes(100, 0).values()}
