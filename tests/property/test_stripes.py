"""Stripes partition the blocks of any object, in order, and are short at both of its ends."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from protocol.stripes import END_BLOCKS, STRIPE_BLOCKS, stripe_blocks, stripe_count, stripe_number

counts = st.one_of(st.integers(0, 8 * END_BLOCKS), st.integers(0, 10**7))


def lengths(block_count: int) -> list[int]:
    return [len(stripe_blocks(number, block_count)) for number in range(stripe_count(block_count))]


def test_the_stripes_that_the_protocol_specifies() -> None:
    assert lengths(0) == []
    assert lengths(8) == [1] * 8
    assert lengths(9) == [1, 1, 2, 1, 2, 1, 1]
    assert lengths(18) == [1, 1, 2, 4, 4, 2, 2, 1, 1]


@given(st.integers(0, 600))
def test_the_stripes_of_an_object_have_each_of_its_blocks_once_and_in_order(block_count: int) -> None:
    stripes = [stripe_blocks(number, block_count) for number in range(stripe_count(block_count))]
    assert [index for stripe in stripes for index in stripe] == list(range(block_count))
    assert all(stripe_number(index, block_count) == number for number, stripe in enumerate(stripes) for index in stripe)


@given(counts, st.data())
@example(10**7, None)
def test_a_block_is_in_its_stripe_which_has_a_bounded_length(block_count: int, data: st.DataObject | None) -> None:
    if not block_count:
        return
    index = data.draw(st.integers(0, block_count - 1)) if data is not None else block_count - 1
    number = stripe_number(index, block_count)
    stripe = stripe_blocks(number, block_count)
    assert index in stripe
    assert 1 <= len(stripe) <= STRIPE_BLOCKS
    assert 0 <= number < stripe_count(block_count)
    if number:
        assert stripe_blocks(number - 1, block_count).stop == stripe.start
    else:
        assert stripe.start == 0
    from_the_end = block_count - 1 - index
    assert len(stripe) <= 1 + min(index, from_the_end)


@given(counts)
def test_an_object_is_the_same_from_both_ends(block_count: int) -> None:
    ends = min(3, stripe_count(block_count) // 2)
    assert lengths(min(block_count, 600))[:ends] == lengths(min(block_count, 600))[: -ends - 1 : -1]
