"""Stripes: the unit in which blocks are placed, asked for and read from the upstream.

A stripe is a run of consecutive blocks of one object. Blocks remain the unit of storage and of verification. Stripes
are short at both ends of an object: at the beginning the first bytes reach many members soon, and at the end no member
is left with much more work than the others. docs/PROTOCOL.md, "Stripes".
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.ids import Digest

STRIPE_BLOCKS = 4
"""Blocks of a stripe in the middle of an object: docs/benchmarks/dataplane.md has the figures of other lengths."""
_ENDS = (0, 1, 2, 2)
"""By the number of blocks between a block and the nearer end of its object: the number of its stripe from that end."""
END_BLOCKS, END_STRIPES = 4, 3
"""The blocks at each end that are in shorter stripes (of 1, 1 and 2 blocks), and the number of these stripes."""


@dataclass(frozen=True, slots=True, order=True)
class StripeId:
    digest: Digest
    number: int


def stripe_number(index: int, block_count: int) -> int:
    """The number of the stripe that has block `index`. An object of up to twice END_BLOCKS has a stripe a block."""
    if block_count <= 2 * END_BLOCKS:
        return index
    if index < END_BLOCKS:
        return _ENDS[index]
    middle = block_count - 2 * END_BLOCKS
    if index < END_BLOCKS + middle:
        return END_STRIPES + (index - END_BLOCKS) // STRIPE_BLOCKS
    return END_STRIPES + -(-middle // STRIPE_BLOCKS) + (END_STRIPES - 1 - _ENDS[block_count - 1 - index])


def stripe_blocks(number: int, block_count: int) -> range:
    """The blocks of stripe `number`."""
    if block_count <= 2 * END_BLOCKS:
        return range(number, number + 1)
    stops = (1, 2, END_BLOCKS)
    if number < END_STRIPES:
        return range(stops[number - 1] if number else 0, stops[number])
    end = block_count - END_BLOCKS
    first = END_BLOCKS + (number - END_STRIPES) * STRIPE_BLOCKS
    if first < end:
        return range(first, min(first + STRIPE_BLOCKS, end))
    left = END_STRIPES - 1 - (number - END_STRIPES - -(-(end - END_BLOCKS) // STRIPE_BLOCKS))
    return range(block_count - stops[left], block_count - (stops[left - 1] if left else 0))


def stripe_count(block_count: int) -> int:
    return stripe_number(block_count - 1, block_count) + 1 if block_count else 0
