"""Range headers: valid ranges select exactly their bytes; others are ignored or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.oci.byte_ranges import MAX_RANGES, Span, parse_range

SIZES = st.integers(0, 5000)
OFFSETS = st.integers(0, 6000)


@given(SIZES, OFFSETS, OFFSETS)
def test_a_closed_range_selects_the_bytes_of_a_slice(size: int, first: int, length: int) -> None:
    spans = parse_range(f"bytes={first}-{first + length}", size)
    data = bytes(i % 251 for i in range(size))
    if not size:
        assert spans is None
        return
    assert spans is not None
    assert b"".join(data[s.start : s.stop] for s in spans) == data[first : first + length + 1]


@given(SIZES, OFFSETS)
def test_open_ended_and_suffix_ranges_meet(size: int, cut: int) -> None:
    rest, suffix = parse_range(f"bytes={cut}-", size), parse_range(f"bytes=-{cut}", size)
    if not size:
        assert rest is suffix is None
        return
    assert rest == ((Span(cut, size),) if cut < size else ())
    assert suffix == ((Span(max(0, size - cut), size),) if cut else ())


@given(st.lists(st.tuples(OFFSETS, OFFSETS), min_size=2, max_size=8), SIZES)
def test_several_ranges_stay_in_order_or_are_ignored_if_they_exceed_the_object(pairs, size: int) -> None:
    header = "bytes=" + ", ".join(f"{a}-{a + b}" for a, b in pairs)
    expected = tuple(Span(a, min(a + b + 1, size)) for a, b in pairs if a < size)
    spans = parse_range(header, size)
    if not size or (len(expected) > 1 and sum(s.length for s in expected) > size):
        assert spans is None
    else:
        assert spans == expected


@given(st.text(max_size=60) | st.text("bytes=-,0123456789 ", max_size=60), SIZES)
def test_any_text_gives_spans_inside_the_object_or_none(header: str, size: int) -> None:
    for span in parse_range(header, size) or ():
        assert 0 <= span.start < span.stop <= size


@pytest.mark.parametrize(
    "header", ["", "bytes", "bytes=", "items=0-1", "bytes=-", "bytes=0-1,x", "bytes=" + "9" * 20 + "-"]
)
def test_malformed_ranges_are_ignored(header: str) -> None:
    assert parse_range(header, 10) is None


@pytest.mark.parametrize("header", ["bytes=2-1", "bytes=0-1,5-4", "bytes=10-", "bytes=-0"])
def test_ranges_that_are_reversed_or_beyond_the_object_are_refused(header: str) -> None:
    assert parse_range(header, 10) == ()


def test_the_number_of_ranges_is_bounded() -> None:
    assert parse_range("bytes=" + ",".join(["0-0"] * (MAX_RANGES + 1)), 1 << 30) is None
