"""Directories: one member's announcements do not push out those of others; entries expire."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import directory
from protocol.directory import MAX_HOLDERS, TTL_S, Directory
from protocol.ids import Digest, PeerId

PEERS = [PeerId(f"peer-{number}") for number in range(4)]
LIAR = PeerId("liar")


def digest(number: int) -> Digest:
    return Digest("sha256", f"{number:064x}")


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(directory, "MAX_ANNOUNCED", 8)
    monkeypatch.setattr(directory, "MAX_ANNOUNCEMENTS", 40)


announcements = st.lists(
    st.tuples(st.sampled_from(PEERS), st.integers(0, 20), st.floats(0, 50)), min_size=1, max_size=80
)


@given(announcements)
def test_names_exactly_those_that_announced_lately_the_latest_first(made: list[tuple[PeerId, int, float]]) -> None:
    held, now, latest = Directory(), 0.0, dict[tuple[int, PeerId], float]()
    for peer, number, pause in made:
        now += pause
        held.announce(digest(number), peer, now)
        latest.pop((number, peer), None)
        latest[number, peer] = now
    for number in range(21):
        expected = [peer for (n, peer), at in reversed(latest.items()) if n == number and at + TTL_S > now]
        assert list(held.holders(digest(number), now)) == expected


def test_a_member_pushes_out_no_more_than_its_part(small: None) -> None:
    """S-60"""
    held = Directory()
    for number in range(32):
        held.announce(digest(number), PEERS[number % 4], 0.0)
    for number in range(1000, 1500):
        held.announce(digest(number), LIAR, 1.0)
    assert [held.holders(digest(number), 1.0) for number in range(32)] == [(PEERS[n % 4],) for n in range(32)]
    assert sum(bool(held.holders(digest(number), 1.0)) for number in range(1000, 1500)) == 8


def test_a_full_directory_forgets_the_oldest(small: None) -> None:
    """S-60"""
    held = Directory()
    for number in range(60):
        held.announce(digest(number), PeerId(f"member-{number}"), 0.0)
    assert [bool(held.holders(digest(number), 0.0)) for number in range(60)] == [False] * 20 + [True] * 40


def test_an_object_has_few_holders_and_each_member_counts_once() -> None:
    """S-60"""
    held = Directory()
    for number in range(MAX_HOLDERS + 4):
        held.announce(digest(1), PeerId(f"member-{number}"), 0.0)
    for _ in range(100):
        held.announce(digest(1), LIAR, 1.0)
    holders = held.holders(digest(1), 1.0)
    assert holders[0] == LIAR
    assert len(holders) == MAX_HOLDERS == len(set(holders))


def test_expired_announcements_are_dropped_as_new_ones_arrive() -> None:
    held = Directory()
    for number in range(50):
        held.announce(digest(number), PEERS[0], 0.0)
    for number in range(50, 76):
        held.announce(digest(number), PEERS[1], TTL_S + 1)
    assert len(held) == 26
